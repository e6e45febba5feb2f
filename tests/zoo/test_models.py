import sys

import lightning.pytorch as pl
import pytest
import torch
from helpers import trainer
from processes import run_python
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import DST, STR
from lightning_sparse.cli import run
from lightning_sparse.compat.extras import extra
from lightning_sparse.zoo.models import VGG16, LeNet5Caffe, LeNet300, ResNet18, SequenceLSTM


def images(count=16, size=28):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 1, size, size, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(count) % 10), batch_size=8)


def weights(module):
    return sum(p.numel() for name, p in module.named_parameters() if "weight" in name)


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (LeNet300(), 784 * 300 + 300 * 100 + 100 * 10),
        (LeNet300(inputs=64), 64 * 300 + 300 * 100 + 100 * 10),
        (LeNet5Caffe(), 20 * 25 + 50 * 20 * 25 + 800 * 500 + 500 * 10),
        (SequenceLSTM(hidden=128), 4 * 128 * (28 + 128 + 128 + 128) + 128 * 10),
        (SequenceLSTM(hidden=256), 4 * 256 * (28 + 256 + 256 + 256) + 256 * 10),
    ],
    ids=["lenet300-mnist", "lenet300-digits", "lenet5", "lstm-a", "lstm-b"],
)
def test_networks_have_the_weights_of_the_papers(module, count):
    assert weights(module) == count


def test_counts_of_the_lenets_are_the_ones_in_print():
    assert weights(LeNet300()) == 266_200
    assert weights(LeNet5Caffe()) == 430_500


def test_the_default_optimizer_is_the_papers():
    (group,) = LeNet300().configure_optimizers().param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 0)


def test_optimizer_and_scheduler_are_given_from_outside():
    module = LeNet300(
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.5),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.1),
    )
    run = trainer([], max_epochs=2)
    run.fit(module, images())
    assert isinstance(run.optimizers[0], torch.optim.AdamW)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)


def test_biases_and_norms_decay_unless_told_otherwise():
    def groups(**training):
        module = VGG16(width=0.125, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-4), **training)
        return module, module.configure_optimizers().param_groups

    module, (group,) = groups()
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
    module, (weights, others) = groups(decay_norm_and_bias=False)
    assert (weights["weight_decay"], others["weight_decay"]) == (1e-4, 0)
    layers = [m.weight for m in module.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert {id(p) for p in weights["params"]} == {id(p) for p in layers}
    assert len(weights["params"]) + len(others["params"]) == len(list(module.parameters()))


def test_thresholds_join_the_weights_that_decay():
    callback = STR(init_threshold=-2.5)
    module = LeNet300(16, (8, 8), optimizer=lambda p: torch.optim.SGD(p, 0.1), decay_norm_and_bias=False)
    run = trainer(callback, max_epochs=1)
    run.fit(module, images(size=4))
    weights, others = (group["params"] for group in run.optimizers[0].param_groups)
    assert len(weights) == 3 + 3
    assert {id(p) for p in others} == {id(layer.bias) for layer in (module.fc1, module.fc2, module.fc3)}


def test_label_smoothing_is_for_training_alone():
    plain, smoothed = LeNet300(), LeNet300(label_smoothing=0.1)
    smoothed.load_state_dict(plain.state_dict())
    x, y = batch = next(iter(images()))
    logs = plain(x).log_softmax(1)
    exact = -logs[torch.arange(len(y)), y].mean()
    run = trainer([], max_epochs=1, limit_train_batches=1)
    run.fit(smoothed, DataLoader(TensorDataset(*batch), batch_size=8))
    assert torch.allclose(run.callback_metrics["train_loss"], 0.9 * exact - 0.1 * logs.mean())
    smoothed.load_state_dict(plain.state_dict())
    run.validate(smoothed, DataLoader(TensorDataset(*batch), batch_size=8), verbose=False)
    assert torch.allclose(run.callback_metrics["val_loss"], exact)


def test_top5_is_the_share_of_images_whose_class_is_among_five():
    module = LeNet300(inputs=1, hidden=(1, 1), classes=7, top5=True)
    with torch.no_grad():  # logits 6, 5, 4, 3, 2, 1, 0
        for parameter in module.parameters():
            parameter.zero_()
        module.fc3.bias.copy_(torch.arange(6.0, -1, -1))
    data = DataLoader(TensorDataset(torch.zeros(8, 1), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])), batch_size=3)
    run = trainer([])
    run.test(module, data, verbose=False)
    assert (run.callback_metrics["test_acc"], run.callback_metrics["test_acc5"]) == (0.25, 0.75)
    with pytest.raises(ValueError, match="top5 needs more than five classes, got classes=5"):
        LeNet300(classes=5, top5=True)


def test_yaml_says_all_of_a_recipe_without_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-sparse"])
    (tmp_path / "mine.yaml").write_text(
        """
        model:
          class_path: lightning_sparse.zoo.models.LeNet300
          init_args:
            inputs: 64
            optimizer:
              class_path: torch.optim.SGD
              init_args: {lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 1.0e-4}
            lr_scheduler:
              class_path: lightning_sparse.zoo.models.WarmupMultiStepLR
              init_args: {milestones: [60, 120, 160], gamma: 0.2, warmup: 1}
            lr_interval: step
            label_smoothing: 0.1
            decay_norm_and_bias: false
            top5: true
        data: lightning_sparse.zoo.data.DigitsDataModule
        trainer: {max_epochs: 1, logger: false, enable_checkpointing: false, enable_progress_bar: false}
        """
    )
    done = run(["fit", "-c", "mine.yaml"])
    weights, others = done.trainer.optimizers[0].param_groups
    assert (weights["weight_decay"], others["weight_decay"]) == (1e-4, 0)
    steps = done.trainer.global_step
    assert steps == 23
    assert weights["lr"] == others["lr"] == pytest.approx(0.1)
    assert done.trainer.lr_scheduler_configs[0].scheduler.steps_per_epoch == steps
    assert "val_acc5" in done.trainer.callback_metrics


@pytest.mark.parametrize("module", [LeNet300(), LeNet5Caffe(), SequenceLSTM(hidden=8)], ids=lambda m: type(m).__name__)
def test_every_network_trains_and_logs_its_metrics(module):
    run = trainer([], max_epochs=1)
    run.fit(module, images(), images())
    assert {"train_loss", "val_loss", "val_acc"} <= set(run.callback_metrics)
    run.test(module, images(), verbose=False)
    assert {"test_loss", "test_acc"} <= set(run.callback_metrics)
    assert torch.cat(run.predict(module, images())).shape == (16,)


def test_accuracy_is_the_share_of_right_answers():
    module = LeNet300(inputs=1, hidden=(1, 1), classes=2)
    with torch.no_grad():  # logits (1, 0): always class 0
        for parameter in module.parameters():
            parameter.zero_()
        module.fc3.bias[0] = 1
    x, y = torch.zeros(8, 1), torch.tensor([0, 0, 0, 1, 1, 0, 0, 0])
    run = trainer([])
    run.validate(module, DataLoader(TensorDataset(x, y), batch_size=3), verbose=False)
    assert run.callback_metrics["val_acc"] == 0.75


def test_an_lstm_reads_rows_in_order():
    module = SequenceLSTM(inputs=4, hidden=8, layers=1, classes=3)
    x = torch.rand(2, 1, 5, 4)
    last = module.lstm(x[:, 0])[0][:, -1]
    assert torch.equal(module(x), module.fc(last))


def test_a_python_runs_checkpoint_loads_plainly(tmp_path):
    module = LeNet300(inputs=784, hidden=(20, 10), optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
    run = trainer(DST(alpha=1e-2), max_epochs=1)
    run.fit(module, images())
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert torch.load(tmp_path / "run.ckpt", weights_only=True)["hyper_parameters"]["hidden"] == (20, 10)
    loaded = LeNet300.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert torch.equal(loaded.fc1.weight, module.fc1.weight)


def test_a_cli_runs_checkpoint_loads_without_the_cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-sparse"])
    run(["fit", "--recipe", "dst-lenet300-digits", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"])
    (path,) = tmp_path.glob("runs/dst-lenet300-digits/version_0/checkpoints/last.ckpt")
    code = (
        "import sys; sys.modules['jsonargparse'] = None\n"
        "from lightning_sparse.zoo.models import LeNet300\n"
        f"print(LeNet300.load_from_checkpoint({str(path)!r}).fc1.in_features)"
    )
    assert run_python("-c", code).split()[-1] == "64"


def test_too_few_classes_are_refused():
    with pytest.raises(ValueError, match="classes must be an integer of at least 2, got 1"):
        LeNet300(classes=1)


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"torchvision is not installed: pip install 'lightning-sparse\[examples\]'"
    ):
        ResNet18()


def test_extra_returns_the_module():
    assert extra("lightning.pytorch", "cli") is pl
