"""The module stays plain: ordinary keys, exact zeros, and whoever looks at it sees effective weights."""

import copy
import io
import itertools

import lightning.pytorch as pl
import pytest
import torch
from averaging import EMAWeightAveraging, WeightAveraging
from helpers import (
    HOOKED,
    PLAINLY,
    REPRESENTATIVES,
    SETTINGS,
    Lit,
    cnn,
    effective,
    fit,
    has_fresh,
    loader,
    same,
    saved,
    seeded,
    state,
    trainer,
)
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*PytreeNode|.*is deprecated:")


def zero_share(state, names):
    return sum(int((state[name] == 0).sum()) for name in names) / sum(state[name].numel() for name in names)


@pytest.fixture(params=SETTINGS)
def method(request):
    return request.param


@pytest.fixture
def callback(method):
    return SETTINGS[method]()


@pytest.fixture
def trained(callback):
    """A small CNN trained sparse."""
    module, run = fit(callback, seeded(lambda: Lit(cnn())))
    assert 0.02 < callback.sparsity < 0.98, "the test would prove nothing"
    return module, callback, run


@pytest.mark.parametrize("method", [*REPRESENTATIVES, *HOOKED])
def test_state_dict_has_the_same_keys_with_and_without_the_callback(callback):
    during = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            during.append(set(pl_module.state_dict()))

    module, _ = fit([callback, Look()], max_epochs=1)
    dense = Lit().state_dict()
    assert set(module.state_dict()) == set(dense)
    assert {name: t.shape for name, t in module.state_dict().items()} == {name: t.shape for name, t in dense.items()}
    assert during
    assert all(keys == set(dense) for keys in during)


def test_checkpoint_loads_strictly_into_a_plain_module_with_the_sparsity_that_the_callback_says(trained, tmp_path):
    module, callback, run = trained
    checkpoint = saved(run, tmp_path / "last.ckpt")
    plain = Lit(cnn())
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    assert sum(callback.layer_density.values()) > 0
    for name, density in callback.layer_density.items():
        zeros = zero_share(plain.state_dict(), [name])
        assert zeros == pytest.approx(1 - density, abs=1e-12) or (zeros > 1 - density and has_fresh(callback))
    assert effective(plain, callback)
    loaded = Lit.load_from_checkpoint(tmp_path / "last.ckpt", net=cnn())
    x = torch.randn(3, 12)
    assert torch.equal(loaded.eval()(x), module.eval()(x))


@pytest.mark.parametrize("method", [*REPRESENTATIVES, *HOOKED])
def test_trained_module_can_be_pickled_whole_and_copied(trained):
    module, callback, _ = trained
    buffer = io.BytesIO()
    torch.save(module.net, buffer)
    buffer.seek(0)
    x = torch.randn(3, 12)
    expected = module.eval()(x)
    assert torch.equal(torch.load(buffer, weights_only=False).eval()(x), expected)
    twin = copy.deepcopy(module)
    assert torch.equal(twin.eval()(x), expected)
    assert effective(twin, callback)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert type(p) is nn.Parameter
        assert p.data_ptr() != q.data_ptr()


def test_trained_lightning_module_can_be_pickled_whole():
    """Lit itself keeps a lambda, so a module without one."""
    module = seeded(Plain)
    fit(SETTINGS["DST"](), module, max_epochs=1)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    x = torch.randn(3, 12)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), module(x))


class Plain(Lit):
    def __init__(self):
        super().__init__()
        self.make_optimizer = None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("method", ["DST", "AutoSparse"])  # the module is no different with others
def test_trained_module_exports_with_torch_export_and_onnx(trained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, callback, _ = trained
    net = module.net.eval()
    x = torch.randn(3, 12)
    with torch.no_grad():
        expected = net(x)
    program = torch.export.export(net, (x,))
    assert torch.equal(program.module()(x), expected)
    assert zero_share(program.state_dict, [name[4:] for name in callback.masks]) == pytest.approx(callback.sparsity)
    path = tmp_path / "net.onnx"
    torch.onnx.export(net, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(output), expected, atol=1e-5)


@pytest.mark.parametrize("method", [*REPRESENTATIVES, *HOOKED])
def test_validate_test_and_predict_see_the_effective_weights(callback):
    seen = []

    class Watched(Lit):
        def forward(self, x):
            if not self.training:
                seen.append((self.trainer.state.fn.value, effective(self, callback), callback.sparsity))
            return super().forward(x)

    module = seeded(Watched)
    run = trainer(callback, val_check_interval=7)
    run.fit(module, loader(), loader(16))
    for call in (run.validate, run.test, run.predict):
        call(module, loader(16), verbose=False) if call != run.predict else call(module, loader(16))
    assert {stage for stage, _, _ in seen} == {"fit", "validate", "test", "predict"}
    assert all(effective for _, effective, _ in seen)
    assert seen[-1][2] > 0.02


HOOKS = [
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_save_checkpoint",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
]


class Spy(pl.Callback):
    """Note of every hook whether the module holds the effective weights."""

    def __init__(self, callback):
        self.seen = {}
        for hook in HOOKS:
            setattr(self, hook, self.note(hook, callback))

    def note(self, hook, callback):
        def look(trainer, pl_module, *args, **kwargs):
            self.seen.setdefault(hook, []).append(effective(pl_module, callback))

        return look


@pytest.mark.parametrize(
    ("method", "first", "accumulate"),
    [
        *((method, "spy", 3) for method in (*REPRESENTATIVES, *HOOKED)),
        *((method, "method", 1) for method in REPRESENTATIVES),
    ],
)
def test_other_callbacks_find_the_effective_weights_in_every_hook(callback, first, accumulate, tmp_path):
    spy = Spy(callback)
    checkpoint = ModelCheckpoint(tmp_path)
    callbacks = [spy, callback, checkpoint] if first == "spy" else [callback, spy, checkpoint]
    run = trainer(callbacks, enable_checkpointing=True, accumulate_grad_batches=accumulate)
    run.fit(seeded(Lit), loader(), loader(16))
    assert callback.sparsity > 0.02
    assert set(spy.seen) == set(HOOKS)
    assert {hook for hook, results in spy.seen.items() if not all(results)} == set()


@pytest.mark.parametrize("method", [*REPRESENTATIVES, *HOOKED])
def test_model_checkpoint_saves_the_effective_weights_and_the_state_of_the_same_moment(callback, tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    fit([callback, keep], enable_checkpointing=True)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 60 // 7
    for path in checkpoints:
        checkpoint = torch.load(path, weights_only=True)
        again = copy.deepcopy(callback)
        again.load_state_dict(checkpoint["callbacks"][callback.state_key])
        assert effective(checkpoint["state_dict"], again)


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_test_with_the_best_checkpoint_brings_module_and_callback_to_the_same_moment(callback, tmp_path):
    class Ages(Lit):
        def validation_step(self, batch, batch_idx):
            self.log("age", float(self.current_epoch))

        test_step = validation_step

    best = ModelCheckpoint(tmp_path, monitor="age", mode="min", filename="best")
    run = trainer([callback, best], enable_checkpointing=True, max_epochs=3)
    module = seeded(Ages)
    run.fit(module, loader(), loader(16))
    last = {**state(callback), **copy.deepcopy(module.state_dict())}
    run.test(module, loader(16), ckpt_path="best", verbose=False, **PLAINLY)
    assert effective(module, callback)
    assert not same(last, {**state(callback), **module.state_dict()})


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_early_stopping_and_learning_rate_monitor_work_beside_it(callback, tmp_path):
    stop = EarlyStopping("val_loss", mode="max", patience=1)  # falls: so it stops after the third epoch at the latest
    logger = CSVLogger(tmp_path)
    callbacks = [callback, stop, LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)]
    module = seeded(lambda: Lit(scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)))
    run = trainer(callbacks, logger=logger, log_every_n_steps=1, max_epochs=10)
    run.fit(module, loader(), loader(64))
    assert run.current_epoch == stop.stopped_epoch + 1 < 10
    assert callback.sparsity > 0
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {name for name in header if name.startswith("lr-")} == {
        "lr-SGD",
        "lr-SGD-momentum",
        "lr-SGD-weight_decay",
    }, "thresholds join the weights' group: there is no other"


class Record(pl.Callback):
    """Keep the parameters after each optimizer step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.values.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_weight_averaging_averages_the_effective_weights_and_is_as_sparse_as_the_last_ones(callback):
    record = Record()
    average = WeightAveraging()
    module, _ = fit([callback, record, average], max_epochs=1)
    for name, p in module.named_parameters():
        expected = torch.stack([values[name] for values in record.values]).mean(0)
        if name in callback.masks:
            expected *= callback.masks[name]
        assert torch.allclose(p, expected, atol=1e-6)
        assert torch.equal(p == 0, expected == 0)


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_ema_averages_the_effective_weights_and_training_goes_on_unharmed_after_each_validation(callback):
    record = Record()
    module = seeded(Lit)
    run = trainer([callback, record, EMAWeightAveraging(decay=0.5)], val_check_interval=5, max_epochs=1)
    run.fit(module, loader(), loader(16))
    ema = record.values[0]
    for step, values in enumerate(record.values[1:], 2):
        ema = {name: 0.5 * ema[name] + 0.5 * values[name] for name in ema}
        if step % 5 == 0:  # it is validated
            ema |= {name: ema[name] * (values[name] != 0) for name in callback.masks}
    assert all(torch.allclose(p, ema[name], atol=1e-6) for name, p in module.named_parameters())
    alone = SETTINGS[type(callback).__name__]()
    fit(alone, max_epochs=1)
    assert same(state(alone), state(callback))


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_stochastic_weight_averaging_averages_the_effective_weights_of_epochs(callback):
    ends = []

    class Ends(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            ends.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)
    module, _ = fit([callback, Ends(), swa], seeded(lambda: Lit(cnn())), max_epochs=3)
    assert len(ends) == 4, "the last epoch is for batch norm alone"
    for name in callback.masks:
        p = module.get_parameter(name)
        average = (ends[1][name] * (ends[2][name] != 0) + ends[2][name]) / 2 * callback.masks[name]
        assert torch.allclose(p, average, atol=1e-6)
        assert torch.equal(p == 0, average == 0)
    assert callback.sparsity > 0.02


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_checkpoint_on_exception_holds_effective_weights(callback, tmp_path):
    class Fails(Lit):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 37:
                raise ValueError("on purpose")
            return super().training_step(batch, batch_idx)

    keep = OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(ValueError, match="on purpose"):
        fit([keep, callback], seeded(Fails), enable_checkpointing=True)
    check_saved(callback, tmp_path / "failed.ckpt")


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_checkpoint_after_an_exception_inside_the_update_holds_effective_weights(callback, tmp_path):
    class Breaks(torch.optim.SGD):
        calls = 0

        def step(self, closure=None):
            loss = super().step(closure)
            Breaks.calls += 1
            if Breaks.calls == 37:
                raise KeyError("within the update")
            return loss

    keep = OnExceptionCheckpoint(tmp_path, "failed")
    module = seeded(lambda: Lit(optimizer=lambda p: Breaks(p, lr=0.1, momentum=0.9, weight_decay=1e-3)))
    with pytest.raises(KeyError, match="within the update"):
        fit([keep, callback], module, enable_checkpointing=True)
    check_saved(callback, tmp_path / "failed.ckpt")
    assert effective(module, callback)


def check_saved(callback, path):
    checkpoint = torch.load(path, weights_only=True)
    assert callback.sparsity > 0.02
    assert effective(checkpoint["state_dict"], callback)
    assert same(checkpoint["callbacks"][callback.state_key], callback.state_dict())


@pytest.mark.parametrize(
    ("method", "option"),
    [
        *((method, {"fast_dev_run": 3}) for method in SETTINGS),  # the schedules of a fit of 3 steps
        *itertools.product(REPRESENTATIVES, [{"barebones": True}, {"overfit_batches": 2}]),
    ],
)
def test_the_trainers_special_modes_leave_effective_weights(callback, option, tmp_path):
    extra = {"logger": None, "enable_checkpointing": None} if "barebones" in option else {}
    if "barebones" in option:
        extra |= {"enable_progress_bar": None, "enable_model_summary": None}
    module, run = fit(callback, max_epochs=20 if "overfit_batches" in option else 1, **extra, **option)
    assert run.global_step > 0
    assert effective(module, callback)
