"""Data: three parts strictly apart, orders that are functions of seed and step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from esper.mesh.errors import Conflict, Corrupt
from esper.tolaria import data
from esper.tolaria.config import Cifar10Data, DigitsData, StdlibData
from esper.tolaria.data.base import ImageDataset, generator, shifted
from esper.tolaria.data.digits import split
from esper.tolaria.data.files import find_cifar10
from esper.tolaria.data.stdlib import part_of


class TestDigits:
    def test_the_parts_are_disjoint_and_together_everything(self):
        """No image is in two parts, none is lost."""
        labels = load_digits().target
        parts = split(labels, DigitsData())
        joined = np.concatenate(list(parts.values()))
        assert len(labels) == len(joined) == len(set(joined.tolist()))

    def test_each_part_has_equal_shares_of_the_classes(self):
        """The cut is stratified: shares of a class differ by less than two images between parts."""
        labels = load_digits().target
        for index in split(labels, DigitsData()).values():
            counts = np.bincount(labels[index], minlength=10) / len(index)
            overall = np.bincount(labels, minlength=10) / len(labels)
            assert np.abs(counts - overall).max() * len(index) < 2

    def test_the_cut_does_not_depend_on_the_seed_of_the_run(self):
        """Runs of different seeds are judged on the same images."""
        one, other = data.load(DigitsData(), 1), data.load(DigitsData(), 2)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(one.test(), other.test(), strict=True))
        assert one.digest == other.digest

    def test_a_batch_is_a_function_of_epoch_index_and_seed(self):
        """Asking again, in any order, from a new object, gives the same batch; another seed gives another."""
        first = data.load(DigitsData(), 5)
        late, early = first.train_batch(3, 2), first.train_batch(0, 0)
        again = data.load(DigitsData(), 5)
        assert torch.equal(late[0], again.train_batch(3, 2)[0])
        assert torch.equal(early[0], again.train_batch(0, 0)[0])
        assert not torch.equal(early[0], data.load(DigitsData(), 6).train_batch(0, 0)[0])

    def test_an_epoch_shows_every_image_at_most_once(self):
        """Without shifts, the batches of an epoch are different training images."""
        dataset = data.load(DigitsData(shift_pixels=0), 0)
        seen = torch.cat([dataset.train_batch(1, i)[0] for i in range(dataset.steps_per_epoch)])
        assert len(seen) == dataset.steps_per_epoch * 64
        assert len(torch.unique(seen.flatten(1), dim=0)) >= len(seen) - 2  # a few images exist twice in the data itself

    def test_a_batch_larger_than_the_data_is_refused(self):
        """The sentence names field and finding."""
        with pytest.raises(ValueError, match=r"data.batch_size: expected at most the \d+ training images, found 5000"):
            data.load(DigitsData(batch_size=5000), 0)


class TestShift:
    def test_each_image_is_moved_within_reach_and_filled(self):
        """Every result is one of the nine moves of its image."""
        x = torch.arange(2 * 1 * 4 * 4, dtype=torch.float32).view(2, 1, 4, 4)
        moved = shifted(x, 1, generator("t"), -5.0)
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1), value=-5.0)
        for image, result in zip(padded, moved, strict=True):
            options = [image[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
            assert any(torch.equal(result, option) for option in options)

    def test_no_reach_changes_nothing(self):
        """Reach 0 gives the images themselves."""
        x = torch.rand(2, 3, 4, 4)
        assert x is shifted(x, 0, generator("t"), 0.0)

    def test_images_of_a_plain_data_set_are_seen_as_they_are(self):
        """The base class augments nothing."""
        x, y = torch.rand(4, 1, 2, 2), torch.arange(4)
        dataset = ImageDataset((x, y), (x, y), (x, y), batch_size=4, eval_batch_size=2, seed=0, digest="d")
        found, labels = dataset.train_batch(0, 0)
        assert torch.equal(x[labels], found)


class TestStdlib:
    def write(self, folder, count=60):
        for number in range(count):
            path = folder / f"package{number % 5}" / f"module{number}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"# module {number}\n" + "value = 1\n" * 40)
        (folder / "site-packages").mkdir()
        (folder / "site-packages" / "foreign.py").write_text("FOREIGN" * 100)
        return StdlibData(dir=str(folder), context=16, steps_per_epoch=5, eval_batches=2, eval_batch_size=4)

    def test_no_file_is_in_two_parts(self, tmp_path):
        """Each module's own first line is in exactly one part."""
        dataset = data.load(self.write(tmp_path), 0)
        texts = {name: bytes(text.tolist()) for name, text in dataset._text.items()}
        for number in range(60):
            marker = f"# module {number}\n".encode()
            assert 1 == sum(marker in text for text in texts.values())
        assert not any(b"FOREIGN" in text for text in texts.values())

    def test_the_part_of_a_file_depends_on_its_path_alone(self):
        """Adding files moves none."""
        config = StdlibData()
        parts = [part_of(f"m{i}.py", config) for i in range(2000)]
        assert parts == [part_of(f"m{i}.py", config) for i in range(2000)]
        assert 120 < parts.count("test") < 280
        assert 120 < parts.count("validation") < 280

    def test_targets_are_the_inputs_one_byte_on(self, tmp_path):
        """The network is asked for the next byte."""
        inputs, targets = data.load(self.write(tmp_path), 0).train_batch(0, 0)
        assert (16, 16) == tuple(inputs.shape)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])

    def test_batches_are_functions_of_position_and_held_out_windows_are_fixed(self, tmp_path):
        """Training windows repeat by position, held-out ones are the same for every seed."""
        config = self.write(tmp_path)
        one, other = data.load(config, 1), data.load(config, 2)
        assert torch.equal(one.train_batch(4, 3)[0], data.load(config, 1).train_batch(4, 3)[0])
        assert not torch.equal(one.train_batch(4, 3)[0], other.train_batch(4, 3)[0])
        for part in ("validation", "test"):
            pairs = zip(getattr(one, part)(), getattr(other, part)(), strict=True)
            assert all(torch.equal(a[0], b[0]) for a, b in pairs)

    def test_a_folder_without_source_says_what_to_give(self, tmp_path):
        """DATA_MISSING with the folder and the field."""
        with pytest.raises(Conflict, match=r"data.dir") as caught:
            data.load(StdlibData(dir=str(tmp_path)), 0)
        assert "DATA_MISSING" == caught.value.reason

    def test_too_little_text_is_refused_by_part(self, tmp_path):
        """A part that is shorter than one sample is named."""
        (tmp_path / "a.py").write_text("x = 1\n")
        with pytest.raises(Conflict, match="part of"):
            data.load(StdlibData(dir=str(tmp_path)), 0)

    def test_files_beyond_the_bound_are_left_out_whole(self, tmp_path):
        """max_bytes bounds what is read."""
        self.write(tmp_path)
        for number in range(60):
            (tmp_path / f"big{number}.py").write_text("y" * 3000)
        config = StdlibData(dir=str(tmp_path), context=16, max_bytes=50_000)
        assert sum(data.load(config, 0).sizes.values()) < 51_000

    def test_the_interpreters_own_library_is_the_default(self):
        """Without a folder the running interpreter's sources are read, up to the bound."""
        dataset = data.load(StdlibData(max_bytes=300_000), 0)
        assert 200_000 < sum(dataset.sizes.values()) <= 300_000 + 200


def write_cifar(folder, per_file=40):
    """Six files in the binary format; every pixel of an image is its number modulo 256."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = bytearray()
        for _ in range(per_file):
            records += bytes([number % 10]) + bytes([number % 256]) * 3072
            number += 1
        (folder / name).write_bytes(records)


class TestCifar10:
    def test_the_binary_format_is_read_and_cut(self, tmp_path):
        """Labels and pixels come out where the format has them; validation is cut from the training files."""
        write_cifar(tmp_path)
        config = Cifar10Data(dir=str(tmp_path), validation_images=30, batch_size=10, shift_pixels=0, flip=False)
        dataset = data.load(config, 0)
        assert {"train": 170, "validation": 30, "test": 40} == dataset.sizes
        for images, labels in [dataset.train_batch(0, 0), *dataset.validation(), *dataset.test()]:
            assert (3, 32, 32) == tuple(images.shape[1:])
            red = (images[:, 0, 0, 0] * 0.2470 + 0.4914) * 255
            assert torch.equal(red.round().long() % 10, labels)
        tested = torch.cat([y for _, y in dataset.test()])
        assert torch.equal(torch.arange(200, 240) % 10, tested)

    def test_the_folder_above_is_found_too(self, tmp_path):
        """data.dir may be what the archive was unpacked into."""
        write_cifar(tmp_path / "cifar-10-batches-bin")
        assert tmp_path / "cifar-10-batches-bin" == find_cifar10(str(tmp_path))

    def test_augmentation_keeps_labels_and_repeats(self, tmp_path):
        """Mirrored and shifted images are functions of the position as well."""
        write_cifar(tmp_path)
        config = Cifar10Data(dir=str(tmp_path), validation_images=30, batch_size=10)
        one, again = data.load(config, 3), data.load(config, 3)
        assert torch.equal(one.train_batch(1, 1)[0], again.train_batch(1, 1)[0])

    def test_nothing_given_says_how_to_give_it(self):
        """The sentence names archive, folder and option."""
        with pytest.raises(Conflict, match=r"cifar-10-binary.tar.gz.*--data-dir") as caught:
            find_cifar10("")
        assert "DATA_MISSING" == caught.value.reason

    def test_an_empty_folder_says_where_it_looked(self, tmp_path):
        """Both places are named."""
        with pytest.raises(Conflict, match="looked for") as caught:
            find_cifar10(str(tmp_path))
        assert str(tmp_path / "cifar-10-batches-bin") in caught.value.public

    def test_a_missing_file_is_named(self, tmp_path):
        """Five of six files are not CIFAR-10."""
        write_cifar(tmp_path)
        (tmp_path / "data_batch_3.bin").unlink()
        with pytest.raises(Conflict, match=r"missing data_batch_3.bin"):
            find_cifar10(str(tmp_path))

    def test_a_torn_file_and_a_wrong_label_are_refused(self, tmp_path):
        """DATA_CORRUPT names file, expectation and finding."""
        write_cifar(tmp_path)
        good = (tmp_path / "data_batch_2.bin").read_bytes()
        (tmp_path / "data_batch_2.bin").write_bytes(good[:-1])
        config = Cifar10Data(dir=str(tmp_path), validation_images=30, batch_size=10)
        with pytest.raises(Corrupt, match=r"data_batch_2.bin: expected a whole number of records"):
            data.load(config, 0)
        (tmp_path / "data_batch_2.bin").write_bytes(b"\x0b" + good[1:])
        with pytest.raises(Corrupt, match="labels 0 to 9, found 11"):
            data.load(config, 0)

    def test_a_validation_set_as_large_as_the_data_is_refused(self, tmp_path):
        """Nothing would be left to learn from."""
        write_cifar(tmp_path)
        with pytest.raises(Conflict, match="validation_images"):
            data.load(Cifar10Data(dir=str(tmp_path), validation_images=200, batch_size=10), 0)
