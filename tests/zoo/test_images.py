import hashlib
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from batches import Seen
from helpers import trainer
from PIL import Image
from torchvision.transforms import functional

from lightning_sparse import RigL
from lightning_sparse.zoo.data import (
    ByteImages,
    CIFAR10DataModule,
    CIFAR100DataModule,
    ImageFolderDataModule,
    ImageNetDataModule,
    TinyImageNetDataModule,
)
from lightning_sparse.zoo.data.images import crop, flip, mean_and_std, rotate
from lightning_sparse.zoo.models import LeNet300, WarmupCosineLR


def pixels(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """The files of CIFAR-10 and CIFAR-100 with 50 and 20 images."""

    def write(kind, folder, name, count, key, first):
        images = pixels(count, 3 * 32 * 32, seed=first).numpy()
        labels = [(first + n) % len(key[1]) for n in range(count)]
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps({"data": images, key[0]: labels}))
        return [name, hashlib.md5(path.read_bytes()).hexdigest()]

    for cifar, key in ((torchvision.datasets.CIFAR10, "labels"), (torchvision.datasets.CIFAR100, "fine_labels")):
        names = [f"class {n}" for n in range(10 if key == "labels" else 100)]
        made = [
            [
                write(cifar, cifar.base_folder, name, 50 // len(cifar.train_list), (key, names), 10 * n)
                for n, (name, _) in enumerate(cifar.train_list)
            ],
            [write(cifar, cifar.base_folder, name, 20, (key, names), 7) for name, _ in cifar.test_list],
        ]
        meta = tmp_path / cifar.base_folder / cifar.meta["filename"]
        meta.write_bytes(pickle.dumps({cifar.meta["key"]: names}))
        monkeypatch.setattr(cifar, "train_list", made[0])
        monkeypatch.setattr(cifar, "test_list", made[1])
        monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": hashlib.md5(meta.read_bytes()).hexdigest()})
    return tmp_path


@pytest.fixture
def folders(tmp_path):
    """Two classes of 6 + 4 training and 2 + 2 test images of 8 x 8, without loss."""
    for split, counts in (("train", (6, 4)), ("test", (2, 2))):
        for label, count in zip(("ant", "bee"), counts, strict=True):
            for n in range(count):
                save(tmp_path / split / label / f"{n}.png", pixels(3, 8, 8, seed=10 * n + len(split)))
    return tmp_path


# ---------------------------------------------------------------------- augmentation


def test_a_crop_is_torchvisions_of_the_padded_image():
    images = pixels(40, 3, 8, 6)
    offsets = torch.randint(7, (40, 2), generator=torch.Generator().manual_seed(1))
    for image, (row, column), cut in zip(images, offsets.tolist(), crop(images, offsets, 3), strict=True):
        assert torch.equal(cut, functional.crop(functional.pad(image, [3] * 4), row, column, 8, 6))
    assert torch.equal(crop(images, torch.full((40, 2), 3), 3), images)


def test_only_the_chosen_images_are_mirrored():
    images = pixels(3, 1, 2, 4)
    mirrored = flip(images, torch.tensor([False, True, False]))
    assert torch.equal(mirrored[::2], images[::2])
    assert torch.equal(mirrored[1], functional.hflip(images[1]))


@pytest.mark.parametrize("size", [(32, 32), (9, 14)])
def test_a_rotation_is_torchvisions(size):
    images = pixels(20, 3, *size)
    degrees = torch.rand(20, generator=torch.Generator().manual_seed(2)) * 30 - 15
    for image, angle, turned in zip(images, degrees.tolist(), rotate(images, degrees), strict=True):
        assert torch.equal(turned, functional.rotate(image, angle))


def test_mean_and_deviation_are_those_of_all_pixels():
    images = pixels(30, 3, 5, 7)
    values = images.double().div(255).transpose(0, 1).flatten(1)
    mean, std = mean_and_std(images)
    torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), values.mean(1))
    torch.testing.assert_close(torch.tensor(std, dtype=torch.float64), values.std(1, correction=0))


def augmented(count=400, **kwargs):
    options = {"padding": 4, "flip": True, "rotation": 15.0, **kwargs}
    return ByteImages(pixels(count, 3, 8, 8), torch.arange(count), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), **options)


def test_images_are_scaled_and_normalised():
    images = augmented(10, padding=0, flip=False, rotation=0.0)
    x, y = images.__getitems__([7, 2])
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(x, (images.images[[7, 2]] / 255 - mean) / std)
    assert y.tolist() == [7, 2]


def test_an_image_is_augmented_by_seed_epoch_and_index_alone():
    images, again = augmented(), augmented()
    images.begin_epoch(3, 5)
    again.begin_epoch(1, 1)
    again.begin_epoch(3, 5)
    x, _ = images.__getitems__([9, 30, 2])
    assert torch.equal(again.__getitems__([30, 2])[0], x[1:])
    assert torch.equal(again[9][0], x[0])
    for other in ((3, 6), (4, 5), (5, 3), (2, 6)):
        again.begin_epoch(*other)
        assert not torch.equal(again.__getitems__([9, 30, 2])[0], x)


def test_windows_and_mirror_images_are_drawn_uniformly():
    images = augmented(20_000, rotation=0.0)
    images.begin_epoch(0, 0)
    counts = torch.bincount((images._offsets * torch.tensor([9, 1])).sum(1), minlength=81).double()
    expected = 20_000 / 81
    assert ((counts - expected).square() / expected).sum() < 120  # chi-square, 80 degrees of freedom: p = 0.003
    assert abs(images._flipped.double().mean() - 0.5) < 0.012
    assert images._offsets.unique().tolist() == list(range(9))


def test_each_kind_of_augmentation_can_be_left_out():
    plain = augmented(padding=0, flip=False, rotation=0.0).__getitems__(range(100))[0]
    for options in ({"padding": 0, "flip": False}, {"padding": 0, "rotation": 0}, {"flip": False, "rotation": 0}):
        only = augmented(**{"rotation": 15.0, **options}).__getitems__(range(100))[0]
        assert not torch.equal(only, plain)


# ---------------------------------------------------------------------- CIFAR


@pytest.mark.parametrize(("module", "classes"), [(CIFAR10DataModule, 10), (CIFAR100DataModule, 100)])
def test_cifar_is_read_from_torchvisions_files(cifar, module, classes):
    data = module(str(cifar), padding=0, flip=False)
    data.prepare_data()
    data.setup("fit")
    assert (len(data.train), len(data.test)) == (50, 20)
    assert data.val is data.test
    assert data.test.labels.tolist() == [(7 + n) % classes for n in range(20)]
    assert torch.equal(data.test.images, pixels(20, 3072, seed=7).view(20, 3, 32, 32))
    x, _ = data.test[0]
    expected = (data.test.images[0] / 255 - torch.tensor(module.mean).view(3, 1, 1)) / torch.tensor(module.std).view(
        3, 1, 1
    )
    torch.testing.assert_close(x, expected)


def test_training_images_are_augmented_and_held_out_ones_are_not(cifar):
    data = CIFAR10DataModule(str(cifar), val_from_train=5)
    data.setup("fit")
    assert (len(data.train), len(data.val), len(data.test)) == (45, 5, 20)
    assert (data.train.padding, data.train.flip) == (4, True)
    for held_out in (data.val, data.test):
        assert (held_out.padding, held_out.flip, held_out.rotation) == (0, False, 0)
    whole = torch.cat([data.train.images, data.val.images]).flatten(1).float().sort(0).values
    data.val_from_train = 0
    data.setup("fit")
    assert torch.equal(whole, data.train.images.flatten(1).float().sort(0).values)


@pytest.mark.parametrize("module", [CIFAR10DataModule, CIFAR100DataModule])
def test_missing_files_of_cifar_are_named_with_the_remedy(tmp_path, module):
    with pytest.raises(FileNotFoundError, match=r"CIFAR10*.*missing. Fetch https.*tar xzf cifar.*download=True"):
        module(str(tmp_path)).prepare_data()


def test_cifar_is_fetched_only_if_that_is_allowed(tmp_path, monkeypatch):
    asked = []

    class Fetch(torchvision.datasets.CIFAR10):
        def __init__(self, root, download=False):
            asked.append((root, download))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fetch)
    for download in (False, True):
        with pytest.raises(FileNotFoundError):
            CIFAR10DataModule(str(tmp_path), download=download).prepare_data()
    assert asked == [(str(tmp_path), True)]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"padding": -1}, "padding must be an integer of at least 0, got -1"),
        ({"rotation": -5}, "rotation must be a finite number of at least 0, got -5"),
        ({"val_from_train": 1.5}, "val_from_train must be an integer of at least 0, got 1.5"),
    ],
)
def test_bad_arguments_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10DataModule(**argument)


def test_images_must_be_left_to_train_on(cifar):
    with pytest.raises(ValueError, match="val_from_train must leave images to train on: below 50, got 50"):
        CIFAR10DataModule(str(cifar), val_from_train=50).setup("fit")


# ---------------------------------------------------------------------- class folders


def test_images_in_class_folders_become_bytes_in_memory(folders):
    data = ImageFolderDataModule(str(folders), mean=(0, 0, 0), std=(1, 1, 1))
    data.prepare_data()
    data.setup("fit")
    assert data.train.labels.tolist() == [0] * 6 + [1] * 4
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.train.images.dtype == torch.uint8
    assert torch.equal(data.train.images[7], pixels(3, 8, 8, seed=15))
    assert torch.equal(data.test[1][0], pixels(3, 8, 8, seed=14) / 255)


def test_images_are_normalised_by_the_training_images_if_nothing_else_is_said(folders):
    data = ImageFolderDataModule(str(folders), padding=0, flip=False)
    data.setup("fit")
    x, _ = data.train.__getitems__(range(10))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3))
    assert torch.equal(data.test.mean, data.train.mean)


def test_held_out_images_of_sorted_folders_have_all_classes(folders):
    data = ImageFolderDataModule(str(folders), val_from_train=5)
    data.setup("fit")
    assert data.val.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No folder train and no folder valid in .*valid/CLASS.*data_dir"):
        ImageFolderDataModule(str(tmp_path), test="valid").prepare_data()


def test_other_classes_in_the_test_folder_are_refused(folders):
    (folders / "test" / "bee").rename(folders / "test" / "cow")
    with pytest.raises(
        ValueError, match=r"test must have the classes of train, \['ant', 'bee'\], got \['ant', 'cow'\]"
    ):
        ImageFolderDataModule(str(folders)).setup("fit")


def test_an_image_of_another_size_is_named(folders):
    save(folders / "train" / "bee" / "2.png", pixels(3, 8, 9))
    with pytest.raises(
        ValueError, match=r"one size, got .*bee/2.png of \[8, 9\] beside .*ant/0.png of \[8, 8\]. Resize"
    ):
        ImageFolderDataModule(str(folders)).setup("fit")


def test_tiny_imagenets_validation_images_get_their_classes_from_the_list(tmp_path):
    for label in ("n02", "n01"):
        for n in range(3):
            save(tmp_path / "train" / label / "images" / f"{label}_{n}.JPEG", pixels(3, 64, 64, seed=n))
    lines = []
    for n, label in enumerate(("n02", "n01", "n02")):
        save(tmp_path / "val" / "images" / f"val_{n}.JPEG", pixels(3, 64, 64, seed=n))
        lines.append(f"val_{n}.JPEG\t{label}\t0\t0\t62\t62\n")
    data = TinyImageNetDataModule(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"val/val_annotations.txt missing. Fetch http.*tiny-imagenet-200.zip"):
        data.prepare_data()
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    data.prepare_data()
    data.setup("fit")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.val.labels.tolist() == [1, 0, 1]
    assert data.val.images.shape == (3, 3, 64, 64)
    assert data.test is data.val


# ---------------------------------------------------------------------- ImageNet


@pytest.fixture
def imagenet(tmp_path):
    """24 training and 4 validation images of several sizes."""
    for split, count in (("train", 12), ("val", 2)):
        for label in ("n01", "n02"):
            for n in range(count):
                save(tmp_path / split / label / f"{label}_{n}.JPEG", pixels(3, 40 + n, 50 - n, seed=n))
    return tmp_path


def small(folder, **kwargs):
    data = ImageNetDataModule(
        str(folder), **{"batch_size": 5, "size": 16, "resize": 20, "workers": 0, "seed": 1, **kwargs}
    )
    data.setup("fit")
    return data


def test_imagenet_is_cut_to_one_size(imagenet):
    data = small(imagenet)
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype, y.shape) == ((5, 3, 16, 16), torch.float32, (5,))
    x, y = next(iter(data.val_dataloader()))
    assert y.tolist() == [0, 0, 1, 1]
    image = functional.to_tensor(
        functional.center_crop(
            functional.resize(Image.open(imagenet / "val" / "n01" / "n01_1.JPEG").convert("RGB"), 20), 16
        )
    )
    assert torch.equal(x[1], functional.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def test_workers_change_nothing(imagenet):
    one, several = small(imagenet).train_dataloader(), small(imagenet, workers=2).train_dataloader()
    for epoch in (0, 1):
        seen = []
        for loader in (one, several):
            loader.sampler.set_epoch(epoch)
            seen.append(list(loader))
        for (x, y), (other, labels) in zip(*seen, strict=True):
            assert torch.equal(x, other)
            assert torch.equal(y, labels)


def test_an_image_is_transformed_by_seed_epoch_and_index_alone(imagenet):
    train = small(imagenet).train
    train.begin_epoch(1, 2)
    state = torch.get_rng_state()
    first = train[7][0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    train[4]
    assert torch.equal(train[7][0], first)
    train.begin_epoch(1, 3)
    assert not torch.equal(train[7][0], first)


def test_missing_folders_of_imagenet_are_named_with_the_remedy(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"ImageNet is not whole in .*: val missing.*ILSVRC2012_img_val.tar"):
        ImageNetDataModule(str(tmp_path)).prepare_data()


def test_the_middle_cannot_be_larger_than_the_image():
    with pytest.raises(ValueError, match="resize must be an integer of at least 224, got 200"):
        ImageNetDataModule(resize=200)


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("stop_after", [2, 3, 5], ids=lambda n: f"batch{n}")
def test_a_resumed_run_sees_the_augmented_images_it_would_have_seen(cifar, stop_after):
    """Three batches an epoch: in the middle of the first, at its end, in the middle of the second; under a method."""

    def fit(seen, ckpt_path=None):
        method = RigL(sparsity=0.5, update_every=2)
        run = trainer([seen, method], max_epochs=2, default_root_dir=cifar, limit_val_batches=0)
        module = LeNet300(3072, (4, 4), lr_scheduler=lambda o: WarmupCosineLR(o, 2, 0.5), lr_interval="step")
        run.fit(module, CIFAR10DataModule(str(cifar), batch_size=20, rotation=15), ckpt_path=ckpt_path)
        return module

    whole, before, after = Seen(), Seen(stop_after), Seen()
    pl.seed_everything(1)
    through = fit(whole)
    pl.seed_everything(1)
    fit(before)
    resumed = fit(after, cifar / "middle.ckpt")
    assert len({sums for _, _, sums, _ in whole.batches}) == 6
    assert before.batches[:stop_after] + after.batches == whole.batches
    for name, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_resumed_run_of_images_from_disk_sees_what_it_would_have_seen(imagenet):
    def fit(seen, ckpt_path=None):
        run = trainer(seen, max_epochs=2, default_root_dir=imagenet, limit_val_batches=0)
        run.fit(LeNet300(inputs=768, hidden=(4, 4)), small(imagenet, workers=1), ckpt_path=ckpt_path)

    whole, before, after = Seen(), Seen(7), Seen()
    fit(whole)
    fit(before)
    fit(after, imagenet / "middle.ckpt")
    assert len(whole.batches) == 10
    assert before.batches[:7] + after.batches == whole.batches


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_lightning_evaluates_images_from_disk_and_from_memory(cifar, imagenet, stage):
    for data, inputs in ((CIFAR10DataModule(str(cifar)), 3072), (small(imagenet, workers=1), 768)):
        result = getattr(trainer([]), stage)(LeNet300(inputs=inputs, hidden=(4, 4)), data)
        assert result
