"""Text that is prepared once: Megatron's files, the same bytes however they are written, and runs
that read them."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

pytest.importorskip("datasets")

from alto_ds.pretrain import prepare as command
from alto_ds.pretrain.data import prepare as module
from alto_ds.pretrain.data.indexed import DTYPES, IndexedDataset, IndexedWriter, bin_of, idx_of
from alto_ds.pretrain.data.order import blended
from alto_ds.pretrain.data.prepare import PrepareError, prepare, tokenized
from alto_ds.pretrain.data.prepared import PreparedSequences
from alto_ds.pretrain.data.sequences import make_sequences
from alto_ds.pretrain.data.shards import read_record, shard_prefix, tokenizer_of
from alto_ds.pretrain.data.text import documents, read_text
from alto_ds.pretrain.data.tokenizer import load_tokenizer
from alto_ds.pretrain.settings import DataSettings, ModelSettings, RunSettings, Settings
from tests import launcher
from tests.pretrain.forked import Forks
from tests.pretrain.runs import STDLIB, TEXTS, measured, options

pytestmark = pytest.mark.usefixtures("datasets_cache")

SHARDS = 3
# Longer, so that a process can be killed between the first shard and the last.
LONG = sorted(STDLIB.glob("*.py"))[:80]
DOCUMENTS = [[5, 6, 7], [8], [], [1, 2, 3, 4, 0], [9, 9]]


def files(prefix: str | Path) -> dict[str, bytes]:
    """What the shards' files hold."""
    folder, name = Path(prefix).parent, Path(prefix).name
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"{name}-*.[bi]*"))}


def prepared(prefix: Path, shards: int = SHARDS, processes: int = 1, **data: Any) -> str:
    values: dict[str, Any] = {"text": TEXTS, "vocab_size": 400} | data
    prepare(DataSettings(**values), str(prefix), shards, processes)
    return str(prefix)


def command_of(prefix: Path, texts: list[Path], shards: int, processes: int) -> list[str]:
    values = {"vocab_size": 400, "output_prefix": prefix, "shards": shards, "processes": processes}
    pairs = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", command.__name__, *pairs, "--text", *map(str, texts)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, datasets_cache: None) -> str:
    """The prefix of three files in three shards."""
    return prepared(tmp_path_factory.mktemp("whole") / "text")


@pytest.fixture
def copy(whole: str, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    shutil.copytree(Path(whole).parent, tmp_path / "copy")
    return tmp_path / "copy" / "text"


def settings(*data: str, length: int = 64, **more: Any) -> Settings:
    return Settings(
        model=ModelSettings(model="gpt2-tiny", seq_length=length),
        data=DataSettings(data=data, **({"validation_fraction": 0.2} | more)),
        run=RunSettings(output_dir=Path("unused"), max_steps=1),
        deepspeed_config={"optimizer": {}},
    )


# The format


def write(prefix: Path, dtype: type[np.integer[Any]]) -> None:
    with IndexedWriter(bin_of(str(prefix)), idx_of(str(prefix)), dtype) as writer:
        for document in DOCUMENTS:
            writer.add(document)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_files_are_those_of_megatron_byte_for_byte_both_ways(
    tmp_path: Path, dtype: type[np.integer[Any]]
) -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.datasets import indexed_dataset as megatron

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write(ours, dtype)
    builder = megatron.IndexedDatasetBuilder(str(bin_of(str(theirs))), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(idx_of(str(theirs))))
    for file in (bin_of, idx_of):
        assert file(str(ours)).read_bytes() == file(str(theirs)).read_bytes()
    read = megatron.IndexedDataset(str(ours))
    assert [read[number].tolist() for number in range(len(read))] == DOCUMENTS
    assert read.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))
    again = IndexedDataset(str(theirs))
    assert [again[number].tolist() for number in range(len(again))] == DOCUMENTS


def test_megatrons_documents_of_several_sequences_are_read_whole(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.datasets import indexed_dataset as megatron

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "of.bin"), dtype=np.uint16)
    builder.add_document(torch.arange(5), [2, 3])
    builder.add_document(torch.arange(4), [4])
    builder.finalize(str(tmp_path / "of.idx"))
    documents = IndexedDataset(str(tmp_path / "of"))
    assert [list(documents[number]) for number in range(len(documents))] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3],
    ]


# Which bytes of the index are changed to what, and what the error says.
WRONG = {
    "magic": (0, b"X", "text.idx is no index of Megatron's"),
    "version": (9, b"\2", "text.idx is of version 2; only version 1 is known"),
    "dtype": (17, b"\7", "text.idx has tokens of dtype 7; known are 1 (uint8)"),
    "count": (18, b"\7", "text.idx has 142 bytes in place of 166"),
    "length": (34, b"\4", "text.idx is broken: its numbers do not fit each other"),
    "negative": (37, b"\xff", "text.idx is broken: its numbers do not fit each other"),
    "pointer": (34 + 20 + 8, b"\1", "text.idx is broken: its numbers do not fit each other"),
    "documents": (34 + 60 + 40, b"\3", "text.idx is broken: its numbers do not fit each other"),
}


@pytest.mark.parametrize("place", WRONG)
def test_a_wrong_index_is_refused_by_name(tmp_path: Path, place: str) -> None:
    write(tmp_path / "text", np.uint16)
    offset, new, message = WRONG[place]
    path = tmp_path / "text.idx"
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(new)] = new
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=re.escape(message)):
        IndexedDataset(str(tmp_path / "text"))


@pytest.mark.parametrize("file", ["text.bin", "text.idx"])
@pytest.mark.parametrize("bytes_lost", [1, 30])
def test_a_file_that_was_cut_off_is_refused_by_name(
    tmp_path: Path, file: str, bytes_lost: int
) -> None:
    write(tmp_path / "text", np.int32)
    size = (tmp_path / file).stat().st_size
    os.truncate(tmp_path / file, size - bytes_lost)
    with pytest.raises(
        ValueError, match=f"{file} has {size - bytes_lost} bytes in place of {size}"
    ):
        IndexedDataset(str(tmp_path / "text"))


# Preparing


def test_shards_hold_the_text_in_its_order_with_end_of_text_after_each_document(
    whole: str,
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_of(whole)))
    end = tokenizer.eos_token_id
    found = []
    for number in range(SHARDS):
        shard = IndexedDataset(shard_prefix(whole, number, SHARDS))
        for document in range(len(shard)):
            *tokens, last = shard[document].tolist()
            assert last == end
            assert end not in tokens
            found.append(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
    assert "".join(found) == "".join(path.read_text() for path in TEXTS)
    records = read_record(Path(f"{whole}.json"))
    assert sum(record.documents for record in records) == len(found)
    assert sum(record.characters for record in records) == sum(map(len, found))
    assert not list(Path(whole).parent.glob("*.new"))


@pytest.mark.slow
def test_the_bytes_depend_neither_on_processes_nor_on_hosts(whole: str, tmp_path: Path) -> None:
    prepared(tmp_path / "processes" / "text", processes=2)
    assert files(tmp_path / "processes" / "text") == files(whole)
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        pytest.skip("no mpirun beside this Python")
    prefix = tmp_path / "hosts" / "text"
    words = command_of(prefix, TEXTS, shards=3, processes=1)
    environment = os.environ | launcher.settings(tmp_path)
    subprocess.run([str(mpirun), "-n", "2", *words], env=environment, check=True, timeout=120)
    assert files(prefix) == files(whole)
    # What one rank cannot write ends both.
    words = command_of(prefix, TEXTS[:2], shards=3, processes=1)
    ended = subprocess.run(
        [str(mpirun), "-n", "2", *words], env=environment, timeout=120, stderr=subprocess.PIPE
    )
    assert ended.returncode == 2
    assert ended.stderr.count(b"has shards of another text") == 1


def test_a_killed_preparation_goes_on_to_the_same_bytes_and_keeps_finished_shards(
    tmp_path: Path,
) -> None:
    prefix = tmp_path / "killed" / "text"
    process = subprocess.Popen(
        command_of(prefix, LONG, shards=6, processes=2),
        env=os.environ | launcher.settings(tmp_path),
        stderr=subprocess.DEVNULL,
    )
    while not (records := list(prefix.parent.glob("text-0*.json"))):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path(f"{prefix}.json").exists()
    kept = [path.with_suffix(".bin") for path in records]
    times = [path.stat().st_mtime_ns for path in kept]
    prepared(prefix, 6, text=LONG)
    assert [path.stat().st_mtime_ns for path in kept] == times
    prepared(tmp_path / "straight" / "text", 6, text=LONG)
    assert files(prefix) == files(tmp_path / "straight" / "text")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_preparation_by_mpirun_of_which_one_rank_is_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, victim: int
) -> None:
    """Killed while it is in the middle of its second shard."""
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        pytest.skip("no mpirun beside this Python")
    text = [*sorted(STDLIB.glob("*.py")), *sorted(STDLIB.glob("test/test_[a-c]*.py"))]
    prefix = tmp_path / "killed" / "text"
    words = [str(mpirun), "-n", "2", *command_of(prefix, text, shards=4, processes=1)]
    environment = os.environ | launcher.settings(tmp_path)
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    second = bin_of(shard_prefix(str(prefix), victim + 2, 4)).name

    def writing() -> bool:
        return any(path.stat().st_size for path in prefix.parent.glob(f"{second}.*.new"))

    while not writing():
        assert process.poll() is None
        time.sleep(0.005)
    (rank,) = (
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("PMI_RANK") == str(victim)
    )
    rank.kill()
    assert process.wait(60) != 0  # mpirun ends the other rank
    assert writing()
    assert not Path(f"{prefix}.json").exists()
    kept = [path.with_suffix(".bin") for path in prefix.parent.glob("text-0*.json")]
    assert kept
    times = [path.stat().st_mtime_ns for path in kept]
    subprocess.run(words, env=environment, check=True, timeout=120)
    assert [path.stat().st_mtime_ns for path in kept] == times
    prepared(tmp_path / "straight" / "text", 4, text=text)
    assert files(prefix) == files(tmp_path / "straight" / "text")
    assert Path(f"{prefix}.json").exists()


def test_a_broken_shard_is_written_anew_and_no_other(copy: Path, whole: str) -> None:
    bins = sorted(copy.parent.glob("*.bin"))
    raw = bytearray(bins[1].read_bytes())
    raw[100] ^= 1
    bins[1].write_bytes(raw)
    times = [path.stat().st_mtime_ns for path in bins]
    prepared(copy)
    assert files(copy) == files(whole)
    now = [path.stat().st_mtime_ns for path in bins]
    assert [a == b for a, b in zip(times, now, strict=True)] == [True, False, True]


def test_shards_of_another_text_or_tokenizer_are_never_mixed(copy: Path) -> None:
    before = files(copy)
    for other in ({"text": TEXTS[:2]}, {"vocab_size": 300}, {"shards": 2}):
        with pytest.raises(PrepareError, match="has shards of another text, tokenizer or number"):
            prepared(copy, **other)
    assert files(copy) == before


def test_two_preparations_at_once_are_refused(copy: Path) -> None:
    descriptor = os.open(tokenizer_of(str(copy)), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    with pytest.raises(PrepareError, match="is being prepared by another process"):
        prepared(copy)
    os.close(descriptor)
    prepared(copy)


def test_documents_of_any_length_are_tokenized_in_pieces_to_the_same_tokens(
    whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHARACTERS", 1000)
    tokenizer = load_tokenizer(str(tokenizer_of(whole)))
    line = "def  f(x):\n\treturn 'Größe'  # 日本\n\n\n    "
    text = line * 200
    (document,) = tokenized([text], tokenizer)
    assert list(document[:-1]) == tokenizer.backend_tokenizer.encode(text).ids


def test_a_file_read_in_parts_is_as_one_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("Größe 日本\r\n\rx".encode() * 9000)
    found = [row["text"] for row in documents(DataSettings(text=[path]))]
    whole = read_text(path, "utf-8")
    assert found == [whole[start : start + 20_000] for start in range(0, len(whole), 20_000)]
    path.write_bytes(path.read_bytes() + b"\xff")
    with pytest.raises(ValueError, match="is not utf-8: byte 0xff at offset 162000"):
        documents(DataSettings(text=[path]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "0"], "--shards=0 must be at least 1"),
        (["--processes", "0"], "--processes=0 must be at least 1"),
        (["--shards", "100000"], "--shards=100000 must be at most 99999"),
        (["--text", "nowhere.txt"], "--text names files that do not exist: nowhere.txt"),
        (["--shards", "999", "--text", str(TEXTS[0])], "--shards=999 is more than the text's "),
        (["--output_prefix", "/"], "--output_prefix=/ is a folder"),
        (
            ["--shards", "1", "--text", str(TEXTS[0]), "--tokenizer", "/no/such"],
            "--tokenizer=/no/such cannot ",
        ),
        (["--shard", "2"], "unrecognized arguments: --shard 2"),
    ],
)
def test_wrong_options_end_the_command_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        status = command.main(["--output_prefix", str(tmp_path / "text"), *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"{command.NAME}: error: {message}")


# Training


def batch(data: PreparedSequences, number: int, gas: int, world_size: int) -> list[list[int]]:
    """All sequences of one global batch of 8, put together from all ranks."""
    micros = [
        list(itertools.islice(data.training_batches(number, 8, gas, rank, world_size), gas))
        for rank in range(world_size)
    ]
    ordered = [micro[a] for a in range(gas) for micro in micros]
    return [row for micro in ordered for row in micro.tolist()]


@pytest.fixture(scope="module")
def sources(whole: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two prepared texts of one tokenizer, and their sequences blended."""
    other = prepared(
        tmp_path_factory.mktemp("other") / "text",
        shards=2,
        text=LONG[:20],
        tokenizer=str(tokenizer_of(whole)),
    )
    data = make_sequences(settings("1", whole, "3", other), resumed=False)
    return {"prefixes": (whole, other), "data": data}


@pytest.mark.parametrize(("gas", "world_size"), [(1, 2), (4, 1), (2, 4)])
def test_batches_are_the_same_on_any_number_of_ranks_from_any_step_on(
    sources: dict[str, Any], gas: int, world_size: int
) -> None:
    straight = sources["data"].training_batches(0, 8, 1, 0, 1)
    first = [next(straight).tolist() for _ in range(6)]
    for number in (0, 5):
        assert batch(sources["data"], number, gas, world_size) == first[number]
    far = batch(sources["data"], 10**5, gas, world_size)  # epochs later
    assert far == batch(sources["data"], 10**5, 1, 1)


def in_order(rows: torch.Tensor) -> torch.Tensor:
    """Sequences in the order of their tokens. pytest takes hours to say how long lists differ."""
    return rows[np.lexsort(rows.T.numpy())]


def test_an_epoch_has_every_token_of_the_training_documents_once(whole: str) -> None:
    data = PreparedSequences(settings(whole, length=32))
    (packed,) = data._training
    batches = data.training_batches(0, 1, 1, 0, 1)
    epochs = [torch.cat([next(batches) for _ in range(len(packed))]) for _ in range(2)]
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(in_order(epochs[0]), in_order(epochs[1]))
    # By another way: whole documents, joined in the order that the seed decides.
    documents = [
        torch.from_numpy(shard[number].astype(np.int64))
        for shard in (IndexedDataset(shard_prefix(whole, n, SHARDS)) for n in range(SHARDS))
        for number in range(len(shard))
    ]
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(1234)).tolist()
    held_out = round(len(documents) * 0.2)
    stream = torch.cat([documents[number] for number in order[held_out:]])
    assert torch.equal(in_order(epochs[0]), in_order(stream.unfold(0, 32, 32)))
    validation = torch.cat([documents[number] for number in order[:held_out]])
    assert torch.equal(data.validation.flatten(), validation[: data.validation.numel()])


def test_another_seed_gives_another_order_and_the_same_seed_the_same(whole: str) -> None:
    first, second = (PreparedSequences(settings(whole)) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert batch(first, 3, 1, 1) == batch(second, 3, 1, 1)
    first._seed += 1
    assert batch(first, 3, 1, 1) != batch(second, 3, 1, 1)


@pytest.mark.parametrize("weights", [("1",), ("1/2", "1/2"), ("0.1", "0.2", "0.7"), ("3/7", "4/7")])
def test_each_source_has_its_share_after_any_number_of_sequences(weights: tuple[str, ...]) -> None:
    shares = [Fraction(weight) for weight in weights]
    turns = list(itertools.islice(blended(shares, 0), 500))
    taken = [0] * len(shares)
    for number, (source, turn) in enumerate(turns, start=1):
        assert turn == taken[source]
        taken[source] += 1
        assert all(abs(t - s * number) <= 1 for t, s in zip(taken, shares, strict=True))
    for start in (1, 2, 3, 99, 400):
        assert list(itertools.islice(blended(shares, start), 50)) == turns[start : start + 50]


def test_a_blend_has_its_weights(sources: dict[str, Any]) -> None:
    data = sources["data"]
    order = list(itertools.islice(data._order(0), 400))
    assert Counter(text for text, _ in order) == {0: 100, 1: 300}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("0.5", "A", "B"), "must be a prefix, or weights above 0 and prefixes in turn"),
        (("A", "0.5", "B", "0.5"), "must be a prefix, or weights above 0 and prefixes in turn"),
        (("0", "A", "1", "B"), "must be a prefix, or weights above 0 and prefixes in turn"),
        (("1/0", "A", "1", "B"), "must be a prefix, or weights above 0 and prefixes in turn"),
        (("nan", "A", "1", "B"), "must be a prefix, or weights above 0 and prefixes in turn"),
        (("1", "A", "1", "A"), "names a prefix twice; add the weights"),
    ],
)
def test_wrong_weights_are_refused(data: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSettings(data=data)


def test_what_does_not_go_with_prepared_text_is_refused() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        DataSettings(data=["A"], text=TEXTS)
    with pytest.raises(ValueError, match="--verify_data goes with --data"):
        DataSettings(verify_data=True)


def test_another_tokenizer_than_the_texts_is_refused(sources: dict[str, Any], copy: Path) -> None:
    other = prepared(copy.parent / "other", vocab_size=300)
    with pytest.raises(ValueError, match=r"was prepared with another tokenizer than .*other"):
        PreparedSequences(settings(str(copy), tokenizer=str(tokenizer_of(other))))
    with pytest.raises(ValueError, match=f"--data={other} was prepared with another tokenizer"):
        PreparedSequences(settings("1", str(copy), "1", other))


def test_a_changed_byte_is_found_where_checksums_are_asked_for(copy: Path) -> None:
    path = sorted(copy.parent.glob("*.bin"))[-1]
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    PreparedSequences(settings(str(copy)))
    with pytest.raises(ValueError, match=f"{path.name} has another checksum than when it was"):
        PreparedSequences(settings(str(copy), verify_data=True))


@pytest.mark.parametrize(
    "broken", ["", "[]", '{"shards": []}', '{"tokenizer": "x", "shards": [1]}']
)
def test_a_broken_manifest_is_refused(copy: Path, broken: str) -> None:
    Path(f"{copy}.json").write_text(broken)
    with pytest.raises(ValueError, match=r"text\.json is not as it was written"):
        PreparedSequences(settings(str(copy)))
    Path(f"{copy}.json").unlink()
    with pytest.raises(ValueError, match=r"text\.json is missing; make it by"):
        PreparedSequences(settings(str(copy)))


def test_too_little_text_is_refused(copy: Path) -> None:
    with pytest.raises(ValueError, match="has too little text for --seq_length=128"):
        PreparedSequences(settings(str(copy), length=128, validation_fraction=0.9999))


def run_options(folder: Path, output: str, *data: str, **more: Any) -> list[str]:
    """Options of a small run on prepared text."""
    words = options(folder, output, **more)
    return [*words[: words.index("--text")], "--data", *data]


def cut_off(copy: Path) -> str:
    path = sorted(copy.parent.glob("*.bin"))[1]
    size = path.stat().st_size
    os.truncate(path, size - 2)
    return f"{path} has {size - 2} bytes in place of {size}"


def name_another_tokenizer(copy: Path) -> str:
    """As a manifest that was copied from elsewhere."""
    (tokenizer,) = {record.tokenizer for record in read_record(Path(f"{copy}.json"))}
    manifest = Path(f"{copy}.json")
    manifest.write_text(manifest.read_text().replace(tokenizer, "0" * 64))
    return f"was prepared with another tokenizer than {copy}-tokenizer: {manifest} has 0000"


def test_broken_text_is_refused_on_all_ranks_by_name(
    forks: Forks, folder: Path, whole: str
) -> None:
    runs = []
    for damage in (cut_off, name_another_tokenizer):
        shutil.copytree(Path(whole).parent, folder / damage.__name__)
        prefix = folder / damage.__name__ / Path(whole).name
        said = damage(prefix)
        output = folder / f"of_{damage.__name__}"
        ranks = forks.start(2, *run_options(folder, output.name, str(prefix)))
        runs.append((ranks, f"alto_ds.pretrain: rank 0: --data={prefix}", said, output))
    for ranks, begin, said, output in runs:
        assert forks.wait(ranks, 100) == [2, 2]
        first, second = (rank.log.read_text() for rank in ranks)
        last = first.strip().splitlines()[-1]
        assert last.startswith(begin)
        assert said in last
        assert "Traceback" not in first + second
        assert said not in second
        assert not (output / "checkpoints").exists()


@pytest.mark.slow
def test_a_run_on_prepared_text_resumes_at_its_place_and_refuses_other_weights(
    forks: Forks, folder: Path, sources: dict[str, Any]
) -> None:
    first, second = sources["prefixes"]
    blend = ("0.4", first, "0.6", second)
    forks.run(2, *run_options(folder, "prepared", *blend, dropout=0.0, max_steps=6))
    # 2 ranks to step 6 and 1 rank from there are as 1 rank to the end.
    forks.run(1, *run_options(folder, "prepared", *blend, dropout=0.0, max_steps=9))
    forks.run(1, *run_options(folder, "prepared1", *blend, dropout=0.0, max_steps=9))
    losses = [[row["loss"] for row in measured(folder / n)] for n in ("prepared", "prepared1")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    other = ("0.5", first, "0.5", second)
    said = forks.run(1, *run_options(folder, "prepared", *other, dropout=0.0), status=2)
    assert "was started with data=" in said
