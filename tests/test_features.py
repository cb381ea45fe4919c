"""The feature cache: exact, resumable after any death, shared by processes, and clear when a store is broken."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import time
import zlib
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest
import torch

from hybrid import features
from hybrid.backbone import Prompt
from hybrid.batches import embed_examples
from hybrid.config import FeatureConfig
from hybrid.features import FeatureCache, Features, fill_cache, text_key

FORK = multiprocessing.get_context("fork")
LAYERS, DIM = 2, 32
FINGERPRINT = {"name": "fake", "layers": [0, 3, 5], "template": "echo"}


class FakeBackbone:
    """One token per word, states that depend on the text alone; the memory is the prompt without its first token."""

    device = torch.device("cpu")

    def __init__(self, fail_at_pass: int | None = None, seconds_per_pass: float = 0.0):
        self.num_tokenised, self.computed, self.num_passes = 0, [], 0
        self.fail_at_pass, self.seconds_per_pass = fail_at_pass, seconds_per_pass

    def prompts(self, texts):
        self.num_tokenised += len(texts)
        return [self._prompt(f"{context} {question}") for context, question in texts]

    def _prompt(self, text: str) -> Prompt:
        ids = [1, *(zlib.crc32(word.encode()) % 50_000 for word in text.split())]
        return Prompt(ids, memory_start=1, memory_stop=len(ids))

    def hidden_states(self, prompts):
        self.num_passes += 1
        if self.num_passes == self.fail_at_pass:
            raise MemoryError("out of memory")
        time.sleep(self.seconds_per_pass)
        self.computed += [tuple(prompt.token_ids) for prompt in prompts]
        return [fake_states(prompt) for prompt in prompts]


def fake_states(prompt: Prompt) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(str(prompt.token_ids).encode()))
    return torch.randn(prompt.memory_stop - prompt.memory_start, LAYERS, DIM, generator=generator).bfloat16()


def open_cache(folder, fingerprint=FINGERPRINT, **options) -> FeatureCache:
    return FeatureCache.open(folder, fingerprint, LAYERS, DIM, **options)


def some_texts(count: int) -> list[tuple[str | None, str]]:
    generator = random.Random(0)
    return [(" ".join(["word"] * generator.randint(1, 9)), f"question {index}") for index in range(count)]


def keys_of(texts) -> list[bytes]:
    return [text_key(context, question) for context, question in texts]


def random_items(count: int, dtype=torch.bfloat16) -> list[tuple[bytes, Features]]:
    generator = torch.Generator().manual_seed(count)
    lengths = [1 + (7 * index) % 11 for index in range(count)]
    return [
        (
            text_key(None, str(index)),
            Features(
                torch.randint(0, 50_000, (length,), generator=generator),
                torch.randn(length, LAYERS, DIM, generator=generator).to(dtype) * 3,
            ),
        )
        for index, length in enumerate(lengths)
    ]


def assert_holds(cache: FeatureCache, texts) -> None:
    """Every text is stored, with the states that the backbone gives it."""
    prompts = FakeBackbone().prompts(texts)
    for prompt, stored in zip(prompts, cache.read(keys_of(texts)), strict=True):
        assert stored.token_ids.tolist() == prompt.token_ids[1:]
        assert torch.equal(stored.states, fake_states(prompt))


def store_folder(root: Path) -> Path:
    (folder,) = [path for path in root.iterdir() if path.is_dir()]
    return folder


# -- keys and values --------------------------------------------------------------------------------------------------


def test_key_depends_on_the_boundary_between_context_and_question():
    texts = [("a", "bc"), ("ab", "c"), ("", "abc"), (None, "abc"), ("abc", ""), ("é", "\ud800")]
    keys = keys_of(texts)
    assert len(set(keys)) == len(texts)
    assert all(len(key) == 16 for key in keys)
    assert keys == keys_of(texts)


def test_bfloat16_roundtrip_is_exact(tmp_path):
    items = random_items(20)
    keys = [key for key, _ in items]
    with open_cache(tmp_path) as cache:
        cache.write(items)
        assert len(cache) == 20
        assert cache.num_bytes == (store_folder(tmp_path) / "data.mdb").stat().st_size
        assert cache.lengths(keys) == [len(features.token_ids) for _, features in items]
    with open_cache(tmp_path, readonly=True) as cache:
        for (_, written), stored in zip(items, cache.read(keys), strict=True):
            assert stored.token_ids.dtype == torch.int32
            assert torch.equal(stored.token_ids, written.token_ids.int())
            assert stored.states.dtype == torch.bfloat16
            assert torch.equal(stored.states, written.states)


def test_int8_error_is_bounded_by_half_a_step_and_the_store_is_smaller(tmp_path):
    items = random_items(20, torch.float32)
    items[3][1].states[0] = 0  # a scale of zero
    with open_cache(tmp_path / "8", storage="int8") as cache, open_cache(tmp_path / "16") as exact:
        cache.write(items)
        exact.write(items)
        stored = cache.read([key for key, _ in items])
        assert cache._token_bytes < 0.6 * exact._token_bytes
    for (_, written), features_ in zip(items, stored, strict=True):
        largest = written.states.abs().amax(-1, keepdim=True)
        bound = largest / 127 / 2 + written.states.abs() * 2**-8 + largest * 2**-9  # a step's half, bfloat16 rounding
        assert features_.states.dtype == torch.bfloat16
        assert ((features_.states.float() - written.states).abs() <= bound).all()
        assert torch.equal(features_.token_ids, written.token_ids.int())


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_read_padded_equals_read_and_is_zero_behind_the_end(tmp_path, storage):
    items = random_items(9)
    keys = [key for key, _ in items][::-1]
    with open_cache(tmp_path, storage=storage) as cache:
        cache.write(items)
        token_ids, states, mask = cache.read_padded([[key] for key in keys])
        longest = max(cache.lengths(keys))
        assert token_ids.shape == mask.shape == (9, longest)
        assert states.shape == (9, longest, LAYERS, DIM)
        assert (token_ids.dtype, states.dtype, mask.dtype) == (torch.int64, torch.bfloat16, torch.bool)
        assert mask.sum(1).tolist() == cache.lengths(keys)
        for row, stored in enumerate(cache.read(keys)):
            assert torch.equal(token_ids[row, mask[row]].int(), stored.token_ids)
            assert torch.equal(states[row, mask[row]], stored.states)
        assert not states[~mask].any() and not token_ids[~mask].any()
        states.fill_(1)  # a copy of our own, not the memory map


def test_embedding_layer_alone_stores_token_ids_only(tmp_path):
    with FeatureCache.open(tmp_path, FINGERPRINT, 0, DIM) as cache:
        cache.write([(b"k" * 16, Features(torch.tensor([5, 6]), torch.empty(2, 0, DIM)))])
        token_ids, states, mask = cache.read_padded([[b"k" * 16]])
    assert token_ids.tolist() == [[5, 6]] and states.shape == (1, 2, 0, DIM) and mask.all()


def test_bad_features_are_refused_and_leave_nothing_behind(tmp_path):
    good, bad = random_items(2)
    with open_cache(tmp_path) as cache:
        bad[1].states[0, 0, 0] = torch.inf
        with pytest.raises(ValueError, match="not finite.*backbone.dtype"):
            cache.write([good, bad])
        with pytest.raises(ValueError, match=r"shape \(3, 1, 32\).*expects \(3, 2, 32\)"):
            cache.write([good, (b"k" * 16, Features(torch.arange(3), torch.zeros(3, 1, DIM)))])
        assert len(cache) == 0


def test_reading_what_is_not_stored_names_the_folder_and_the_command(tmp_path):
    with open_cache(tmp_path) as cache:
        with pytest.raises(ValueError, match="lacks 1 of 1 texts.*hybrid embed") as raised:
            cache.read_padded([[text_key(None, "never seen")]])
        assert str(cache.folder) in str(raised.value)


# -- filling ----------------------------------------------------------------------------------------------------------


def test_second_fill_computes_nothing_and_does_not_tokenise(tmp_path):
    texts = some_texts(30)
    with open_cache(tmp_path) as cache:
        first, second = FakeBackbone(), FakeBackbone()
        assert fill_cache(cache, first, texts, token_budget=40, progress=False) == 30
        assert fill_cache(cache, second, texts, token_budget=40, progress=False) == 0
        assert first.num_passes > 3 and second.num_passes == second.num_tokenised == 0
        assert_holds(cache, texts)
        assert fill_cache(cache, second, some_texts(33), token_budget=40, progress=False) == 3
        assert len(second.computed) == second.num_tokenised == 3


def test_duplicates_are_computed_once(tmp_path):
    texts = some_texts(5) * 3
    with open_cache(tmp_path) as cache:
        backbone = FakeBackbone()
        assert cache.missing(keys_of(texts)) == [0, 1, 2, 3, 4]
        assert fill_cache(cache, backbone, texts, token_budget=40, progress=False) == 5
        assert len(backbone.computed) == 5
        assert_holds(cache, texts)


def test_progress_counts_tokens(tmp_path, capsys):
    texts = some_texts(5)
    num_tokens = sum(len(prompt.token_ids) for prompt in FakeBackbone().prompts(texts))
    with open_cache(tmp_path) as cache:
        fill_cache(cache, FakeBackbone(), texts, token_budget=40)
    assert f"{num_tokens}.0/{num_tokens}.0" in capsys.readouterr().err


def test_fill_that_fails_keeps_earlier_batches_and_resumes(tmp_path):
    texts = some_texts(40)
    failing, resumed = FakeBackbone(fail_at_pass=4), FakeBackbone()
    with open_cache(tmp_path) as cache, pytest.raises(MemoryError):
        fill_cache(cache, failing, texts, token_budget=40, progress=False)
    with open_cache(tmp_path) as cache:
        assert 0 < len(cache) == len(failing.computed) < 40
        assert fill_cache(cache, resumed, texts, token_budget=40, progress=False) == 40 - len(failing.computed)
        assert not set(resumed.computed) & set(failing.computed)
        assert_holds(cache, texts)


def test_each_thread_takes_a_batch_of_its_own_and_results_keep_their_order(tmp_path):
    texts, running, most = some_texts(60), [], []

    class CountingBackbone(FakeBackbone):
        def hidden_states(self, prompts):
            running.append(torch.get_num_threads())
            most.append(list(running))
            states = super().hidden_states(prompts)
            running.pop()
            return states

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        failing = FakeBackbone()
        with open_cache(tmp_path) as cache, pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache, "write", lambda items: 1 / 0)
            with pytest.raises(ZeroDivisionError) as held:  # the error is held, and the threads stop all the same
                fill_cache(cache, failing, texts, token_budget=40, progress=False)
        assert held and failing.num_passes <= 2 * 3 and torch.get_num_threads() == 3
        with open_cache(tmp_path) as cache:
            backbone = CountingBackbone(seconds_per_pass=0.01)
            assert fill_cache(cache, backbone, texts, token_budget=40, progress=False) == 60
            assert_holds(cache, texts)
        assert max(most, key=len) == [1, 1, 1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


class LoudBackbone(FakeBackbone):
    """Says before every pass how many texts are stored by now."""

    def __init__(self, announce):
        super().__init__(seconds_per_pass=0.02)
        self.announce = announce

    def hidden_states(self, prompts):
        self.announce.send(len(self.computed))
        return super().hidden_states(prompts)


def test_killed_fill_loses_at_most_the_batch_in_flight(tmp_path):
    texts, backbone = some_texts(400), FakeBackbone()
    listen, announce = FORK.Pipe(duplex=False)
    process = FORK.Process(
        target=lambda: fill_cache(open_cache(tmp_path), LoudBackbone(announce), texts, token_budget=40, progress=False)
    )
    process.start()
    num_announced = 0
    while num_announced < 40:
        num_announced = listen.recv()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    while listen.poll():
        num_announced = listen.recv()
    with open_cache(tmp_path) as cache:
        num_stored = len(cache)
        assert num_announced <= num_stored < 400
        assert fill_cache(cache, backbone, texts, token_budget=40, progress=False) == 400 - num_stored
        assert_holds(cache, texts)


def test_large_store_answers_that_nothing_is_missing_quickly(tmp_path):
    keys = [text_key(None, str(index)) for index in range(50_000)]
    tiny = Features(torch.tensor([7]), torch.zeros(1, 0, 1))
    with FeatureCache.open(tmp_path, FINGERPRINT, 0, 1) as cache:
        cache.write((key, tiny) for key in keys)
        start = time.perf_counter()
        assert fill_cache(cache, FakeBackbone(), [(None, str(index)) for index in range(50_000)], 40) == 0
        assert time.perf_counter() - start < 0.5


# -- processes --------------------------------------------------------------------------------------------------------


def run_forked(function) -> None:
    process = FORK.Process(target=function)
    process.start()
    process.join(timeout=20)
    assert process.exitcode == 0


def read_until_complete(cache: FeatureCache, texts, num_seen) -> None:
    """In another process: whatever is stored is whole and right, until all of it is."""
    while True:
        missing = set(cache.missing(keys_of(texts)))
        assert_holds(cache, [text for index, text in enumerate(texts) if index not in missing])
        num_seen.put(len(texts) - len(missing))
        if not missing:
            return


def test_two_forked_processes_read_while_one_writes(tmp_path):
    texts, num_seen = some_texts(120), FORK.Queue()
    with open_cache(tmp_path) as cache:
        arguments = (cache, texts, num_seen)  # inherited, environment and all
        readers = [FORK.Process(target=read_until_complete, args=arguments, daemon=True) for _ in range(2)]
        for reader in readers:
            reader.start()
        num_seen.get(timeout=10)
        fill_cache(cache, FakeBackbone(seconds_per_pass=0.005), texts, token_budget=40, progress=False)
        seen = set()
        while any(reader.is_alive() for reader in readers) or not num_seen.empty():
            if not num_seen.empty():
                seen.add(num_seen.get())
        assert [reader.exitcode for reader in readers] == [0, 0]
        assert len(seen) > 2  # they did read in the middle of it
        assert_holds(cache, texts)


def test_a_forked_child_leaves_the_parents_reader_slot_alone(tmp_path):
    with open_cache(tmp_path) as cache, open_cache(tmp_path) as other:
        cache.write(random_items(3))
        with cache._transaction():
            slots = cache._environment.readers()
            assert str(os.getpid()) in slots
            run_forked(lambda: (cache.close(), other.close()))
            assert cache._environment.readers() == slots
        run_forked(lambda: (len(cache), len(other), cache.write(random_items(5))))
        assert len(other) == 5


def test_pickled_cache_reopens_in_another_process(tmp_path):
    with open_cache(tmp_path) as cache:
        items = random_items(3)
        cache.write(items)
        pickled = pickle.dumps(cache)
        assert len(pickle.loads(pickled)) == 3  # beside the first, in one process

        def write_one_more():
            pickle.loads(pickled).write([(b"k" * 16, items[0][1])])

        run_forked(write_one_more)
        assert torch.equal(cache.read([b"k" * 16])[0].states, items[0][1].states)


def test_caches_of_one_process_share_a_store_and_close_independently(tmp_path):
    first, second = open_cache(tmp_path), open_cache(tmp_path, readonly=True)
    first.write(random_items(4))
    assert len(second) == 4
    first.close()
    assert len(second) == 4
    with pytest.raises(ValueError, match="readonly=True"):
        second.write(random_items(1))


# -- stores -----------------------------------------------------------------------------------------------------------


def test_stores_are_separate_by_fingerprint_and_storage_and_described_for_people(tmp_path):
    with open_cache(tmp_path) as cache:
        cache.write(random_items(3))
        assert json.loads((cache.folder / "fingerprint.json").read_text())["fingerprint"] == FINGERPRINT
    for options in ({"fingerprint": {**FINGERPRINT, "template": "plain"}}, {"storage": "int8"}):
        with open_cache(tmp_path, **options) as cache:
            assert len(cache) == 0
    with open_cache(tmp_path, dict(reversed(FINGERPRINT.items()))) as cache:  # the order of keys means nothing
        assert len(cache) == 3
    with pytest.raises(ValueError, match="features.storage='float8'"):
        open_cache(tmp_path, storage="float8")


def test_default_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    with open_cache(None) as cache:
        assert cache.folder.parent == tmp_path / "features"


def test_readonly_never_creates_a_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="hybrid embed"):
        open_cache(tmp_path, readonly=True)
    assert not list(tmp_path.iterdir())


def test_store_in_a_folder_without_write_permission_can_be_read(tmp_path, monkeypatch):
    with open_cache(tmp_path) as cache:
        cache.write(random_items(3))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with open_cache(tmp_path) as cache:
        assert len(cache) == 3
        with pytest.raises(RuntimeError, match="permission"):
            cache.write(random_items(4))


def test_address_space_limit_shrinks_the_map(tmp_path, monkeypatch):
    def limited(path, map_size, **options):
        if map_size > 1 << 32:
            raise lmdb.MemoryError("Cannot allocate memory")
        return unlimited(path, map_size=map_size, **options)

    unlimited = lmdb.open
    monkeypatch.setattr(lmdb, "open", limited)
    with open_cache(tmp_path) as cache:
        cache.write(random_items(3))
        assert cache._environment.info()["map_size"] == 1 << 32


# -- errors -----------------------------------------------------------------------------------------------------------


def assert_one_line(raised, folder: Path, *words: str) -> None:
    message = str(raised.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message


def damage(kind: str, data: Path) -> None:
    content = data.read_bytes()
    data.write_bytes(
        {
            "cut in half": content[: len(content) // 2],
            "cut by a page": content[:-4096],
            "cut in the header": content[:100],
            "emptied": b"",
            "zeros": bytes(len(content)),
            "garbage": random.Random(0).randbytes(len(content)),
            "garbage behind the header": content[:8192] + random.Random(0).randbytes(len(content) - 8192),
        }[kind]
    )


@pytest.mark.parametrize(
    "kind",
    ["cut in half", "cut by a page", "cut in the header", "emptied", "zeros", "garbage", "garbage behind the header"],
)
def test_damaged_store_gives_one_line_and_deleting_it_is_the_fix(tmp_path, kind):
    texts = some_texts(50)
    with open_cache(tmp_path) as cache:
        fill_cache(cache, FakeBackbone(), texts, token_budget=40, progress=False)
    damage(kind, cache.folder / "data.mdb")
    for readonly in (True, False):
        with pytest.raises(RuntimeError) as raised:
            open_cache(tmp_path, readonly=readonly)
        assert_one_line(raised, cache.folder, "delete this folder", "hybrid embed")
    for path in cache.folder.iterdir():
        path.unlink()
    cache.folder.rmdir()
    with open_cache(tmp_path) as fresh:
        assert fill_cache(fresh, FakeBackbone(), texts, token_budget=40, progress=False) == 50


def test_store_of_another_fingerprint_is_refused(tmp_path):
    with open_cache(tmp_path / "a") as ours, open_cache(tmp_path / "b", {"name": "other"}) as other:
        pass
    (ours.folder / "data.mdb").write_bytes((other.folder / "data.mdb").read_bytes())
    with pytest.raises(RuntimeError) as raised:
        open_cache(tmp_path / "a")
    assert_one_line(raised, ours.folder, "another backbone", "delete this folder")


@pytest.mark.parametrize("value", [b"", b"1234567", b"\1\0\0\0\1\0\0\0" + bytes(50), b"\1\0\0\0\2\0\0\0" + bytes(132)])
def test_damaged_value_gives_one_line(tmp_path, value):
    with open_cache(tmp_path) as cache:
        with cache._transaction(write=True) as transaction:
            transaction.put(b"k" * 16, value)
        with pytest.raises(RuntimeError) as raised:
            cache.read_padded([[b"k" * 16]])
        assert_one_line(raised, cache.folder, "delete this folder", "hybrid embed")


def test_full_map_keeps_earlier_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAP_BYTES", 1 << 17)
    texts, backbone = some_texts(400), FakeBackbone()
    with open_cache(tmp_path) as cache:
        with pytest.raises(RuntimeError) as raised:
            fill_cache(cache, backbone, texts, token_budget=40, progress=False)
        assert_one_line(raised, cache.folder, "ulimit -v", "run again")
        assert 0 < len(cache) < 400
    monkeypatch.undo()
    with open_cache(tmp_path) as cache:
        num_stored = len(cache)
        assert fill_cache(cache, FakeBackbone(), texts, token_budget=40, progress=False) == 400 - num_stored
        assert_holds(cache, texts)


def test_full_disk_keeps_earlier_batches(tmp_path):
    """A limit on file size stands in for the disk: the kernel really refuses to write."""
    texts = some_texts(400)

    def fill_a_small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
        with open_cache(tmp_path) as cache, pytest.raises(RuntimeError) as raised:
            fill_cache(cache, FakeBackbone(), texts, token_budget=40, progress=False)
        assert_one_line(raised, cache.folder, "free some space", "run again")
        assert 0 < len(cache) < 400  # still readable

    run_forked(fill_a_small_disk)
    with open_cache(tmp_path) as cache:
        num_stored = len(cache)
        assert 0 < num_stored < 400
        assert fill_cache(cache, FakeBackbone(), texts, token_budget=40, progress=False) == 400 - num_stored
        assert_holds(cache, texts)


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (lmdb.DiskError(f"mdb_txn_commit: {os.strerror(errno.ENOSPC)}"), "free some space"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "free some space"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "permissions"),
        (lmdb.ReadonlyError("mdb_txn_begin: Permission denied"), "permissions"),
        (lmdb.ReadersFullError("MDB_READERS_FULL"), "other users"),
    ],
)
def test_errors_on_opening_give_one_line(tmp_path, monkeypatch, error, fix):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(lmdb, "open", refuse)
    with pytest.raises(RuntimeError) as raised:
        open_cache(tmp_path)
    assert_one_line(raised, store_folder(tmp_path), fix)


def test_a_text_that_is_too_long_is_found_before_the_largest_set_is_embedded(backbone, examples, tmp_path):
    sets = {"train": examples, "valid": [replace(examples[0], question=examples[0].question * 40)]}
    with pytest.raises(ValueError, match="shorten it"):
        embed_examples(FeatureConfig(folder=str(tmp_path)), backbone, sets, progress=False)
    cache = FeatureCache.open(tmp_path, backbone.fingerprint(), backbone.num_stored_layers, backbone.dim)
    assert len(cache) == 0
