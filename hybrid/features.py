"""The on-disk cache of hidden states: every text passes through the frozen backbone once, ever.

One LMDB environment per fingerprint (everything that the states depend on, beside the text), shared by data sets and
splits, because a key is a hash of the text alone. A batch is written in one transaction, so a killed run loses at
most the batches in flight; readers of any process see whole batches only, and copy straight from the memory map.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import lmdb
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hybrid.backbone import cache_folder, length_batches
from hybrid.parallel import map_in_threads

if TYPE_CHECKING:
    from hybrid.backbone import Backbone

FORMAT = 1
COMPILED_TOKENS = 1_000_000  # from here on compiling saves more than the 15 s that it takes
HEADER = struct.Struct("<II")  # format, tokens
METADATA_KEY = b"metadata"  # text keys have 16 bytes, so none can collide with it
MAP_BYTES, MIN_MAP_BYTES = 1 << 40, 1 << 28  # address space, not disk: the file grows as it is written
FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)]  # EIO: a cut-short write


def text_key(context: str | None, question: str) -> bytes:
    """16 bytes that stand for a text; the context's length is hashed too, so that moving its end changes the key."""
    context_bytes = b"" if context is None else context.encode("utf-8", "surrogatepass")
    length = -1 if context is None else len(context_bytes)
    question_bytes = question.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(struct.pack("<q", length) + context_bytes + question_bytes, digest_size=16).digest()


@dataclass
class Features:
    """What the cache holds for one text.

    Attributes:
        token_ids: The tokens whose states become memory, shape (tokens,), int32.
        states: Their hidden states, shape (tokens, stored_layers, backbone_dim).
    """

    token_ids: Tensor
    states: Tensor


class FeatureCache:
    """Hidden states by text key, in `folder`. Open it with `FeatureCache.open`.

    Safe for many processes, pickling and forks (but not a fork while another thread reads): a process opens the
    environment where it first uses it, and all caches of one store in it share that one, as LMDB demands.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any], readonly: bool):
        self.folder, self.readonly = folder, readonly
        self._metadata = metadata
        shape = (metadata["num_layers"], metadata["dim"])
        states = [("<f4", shape[:1]), ("i1", shape)] if metadata["storage"] == "int8" else [("<i2", shape)]
        # Type and shape per token of the arrays in a value: token ids, scales (int8 only), states (bfloat16 as int16).
        self._parts = [(np.dtype(dtype), shape) for dtype, shape in [("<i4", ()), *states]]
        self._token_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self._parts)
        self._environment: lmdb.Environment | None = None
        _caches.add(self)

    @classmethod
    def open(
        cls,
        folder: str | Path | None,
        fingerprint: dict[str, Any],
        num_layers: int,
        dim: int,
        storage: str = "bfloat16",
        readonly: bool = False,
    ) -> FeatureCache:
        """Open the store of a fingerprint, and create it where there is none.

        Args:
            folder: Folder of all stores; `None` is `$HYBRID_CACHE/features` or `~/.cache/hybrid/features`.
            fingerprint: What the states depend on, JSON-ready: `Backbone.fingerprint()`.
            num_layers: Stored layers.
            dim: Hidden size of the backbone.
            storage: `bfloat16`, or `int8` with one scale per token and layer (half the size).
            readonly: Refuse to write, and to create a store.

        Raises:
            FileNotFoundError: `readonly`, and there is no such store.
            RuntimeError: The store is damaged, full or not accessible.
        """
        if storage not in ("bfloat16", "int8"):
            raise ValueError(f"features.storage={storage!r}: expected 'bfloat16' or 'int8'")
        metadata = dict(format=FORMAT, storage=storage, num_layers=num_layers, dim=dim, fingerprint=fingerprint)
        name = hashlib.blake2b(_json_bytes(metadata), digest_size=8).hexdigest()
        root = Path(folder).expanduser() if folder is not None else cache_folder() / "features"
        cache = cls(root.resolve() / name, metadata, readonly)
        with cache._transaction():
            return cache

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Positions of the keys that are not stored, the first of each where keys repeat."""
        first: dict[bytes, int] = {}
        for position, key in enumerate(keys):
            first.setdefault(key, position)
        with self._transaction() as transaction:
            return [position for key, position in first.items() if transaction.get(key) is None]

    def lengths(self, keys: Sequence[bytes]) -> list[int]:
        """Memory vectors of each text. Reads the index only, never the states."""
        with self._transaction() as transaction:
            return [self._num_tokens(value) for value in self._values(transaction, keys)]

    def read(self, keys: Sequence[bytes]) -> list[Features]:
        """Features of each text; states in bfloat16."""
        padded = (self.read_padded([[key]]) for key in keys)
        return [Features(token_ids[0].int(), states[0]) for token_ids, states, _ in padded]

    def read_padded(self, keys: Sequence[Sequence[bytes]]) -> tuple[Tensor, Tensor, Tensor]:
        """A batch, copied once from the memory map and zero behind each row's end.

        Args:
            keys: The texts of each row, which are read one after another.

        Returns:
            Token ids (batch, tokens) int64, states (batch, tokens, stored_layers, backbone_dim) bfloat16, and the
            mask (batch, tokens), true at tokens that exist.

        Raises:
            ValueError: A text is not stored.
            RuntimeError: A value is damaged.
        """
        with self._transaction() as transaction:
            rows = [[(value, self._num_tokens(value)) for value in self._values(transaction, row)] for row in keys]
            lengths = [sum(length for _, length in row) for row in rows]
            longest = max(lengths, default=0)
            padded = [np.zeros((len(keys), longest, *shape), dtype) for dtype, shape in self._parts]
            for number, row in enumerate(rows):
                start = 0
                for value, length in row:
                    for target, part in zip(padded, self._decode(value, length), strict=True):
                        target[number, start : start + length] = part
                    start += length
        token_ids, *scales, states = map(torch.from_numpy, padded)
        states = (states * scales[0].unsqueeze(-1)).bfloat16() if scales else states.view(torch.bfloat16)
        mask = torch.arange(longest) < torch.tensor(lengths, dtype=torch.long).unsqueeze(-1)
        return token_ids.long(), states, mask

    def __len__(self) -> int:
        with self._transaction() as transaction:
            return max(0, transaction.stat()["entries"] - 1)  # less the metadata

    @property
    def num_bytes(self) -> int:
        """Size of the store on disk."""
        return (self.folder / "data.mdb").stat().st_size

    def write(self, items: Iterable[tuple[bytes, Features]]) -> None:
        """Store texts in one transaction: all of them or, after an error, none. Keys that exist are kept as they are.

        Raises:
            ValueError: The cache is read-only, or the features have the wrong shape or are not finite.
            RuntimeError: The disk is full or the store not accessible; earlier writes are kept.
        """
        if self.readonly:
            raise ValueError(f"feature store {self.folder} was opened with readonly=True: open it without to write")
        encoded = [(key, self._encode(features)) for key, features in items]
        with self._transaction(write=True) as transaction:
            for key, value in encoded:
                transaction.put(key, value, overwrite=False)

    def _encode(self, features: Features) -> bytes:
        token_ids, states = features.token_ids.cpu(), features.states.detach().cpu()
        expected = (len(token_ids), self._metadata["num_layers"], self._metadata["dim"])
        if states.shape != expected:
            raise ValueError(f"hidden states have shape {tuple(states.shape)}: this store expects {expected}")
        if not states.isfinite().all():
            raise ValueError("hidden states are not finite: set backbone.dtype to bfloat16 or float32")
        arrays = [token_ids.int()]
        if self._metadata["storage"] == "int8":
            scales = states.float().abs().amax(dim=-1) / 127  # (tokens, layers)
            arrays += [scales, (states / scales.clamp_min(1e-30).unsqueeze(-1)).round().to(torch.int8)]
        else:
            arrays += [states.bfloat16().view(torch.int16)]
        return b"".join([HEADER.pack(FORMAT, len(token_ids)), *(array.numpy().tobytes() for array in arrays)])

    def _decode(self, value: memoryview, num_tokens: int) -> Iterator[np.ndarray]:
        """The arrays of a value, as views of the memory map: valid inside the transaction only."""
        if HEADER.unpack_from(value) != (FORMAT, num_tokens):
            raise _damaged(self.folder, "a value's length differs from its header")
        offset = HEADER.size
        for dtype, shape in self._parts:
            count = num_tokens * math.prod(shape)
            yield np.frombuffer(value, dtype, count, offset).reshape(num_tokens, *shape)
            offset += count * dtype.itemsize

    def _num_tokens(self, value: memoryview) -> int:
        num_tokens, rest = divmod(len(value) - HEADER.size, self._token_bytes)
        if rest or num_tokens < 0:
            raise _damaged(self.folder, f"a value has {len(value)} bytes, which is no whole number of tokens")
        return num_tokens

    def _values(self, transaction: lmdb.Transaction, keys: Sequence[bytes]) -> list[memoryview]:
        values = [transaction.get(key) for key in keys]
        if absent := values.count(None):
            raise ValueError(f"feature store {self.folder} lacks {absent} of {len(keys)} texts: run `hybrid embed`")
        return cast(list[memoryview], values)  # the transaction has `buffers=True`

    @contextmanager
    def _transaction(self, write: bool = False) -> Generator[lmdb.Transaction]:
        if self.readonly and self._environment is None and not (self.folder / "data.mdb").exists():
            raise FileNotFoundError(f"no feature store in {self.folder}: run `hybrid embed` first")
        with _one_line_errors(self.folder):
            if self._environment is None:
                self._environment = self._shared_environment() or self._open_environment()
            with self._environment.begin(write=write, buffers=True) as transaction:
                yield transaction

    def _shared_environment(self) -> lmdb.Environment | None:
        shared = (cache._environment for cache in _caches if cache.folder == self.folder)
        return next((environment for environment in shared if environment is not None), None)

    def _open_environment(self) -> lmdb.Environment:
        self.folder.mkdir(parents=True, exist_ok=True)
        known = (self.folder / "fingerprint.json").exists()  # asked first: another process may be creating the store
        environment = _open_lmdb(self.folder)
        try:
            self._verify(environment, known)
        except BaseException:
            environment.close()
            raise
        return environment

    def _verify(self, environment: lmdb.Environment, known: bool) -> None:
        """Refuse a damaged store before anything touches the map: reading behind a file's end kills the process."""
        environment.reader_check()  # frees the slots of readers that were killed
        num_bytes = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if self.num_bytes < num_bytes:
            raise _damaged(self.folder, f"data.mdb is cut short: {self.num_bytes} of {num_bytes} bytes")
        with environment.begin() as transaction:
            metadata, num_entries = transaction.get(METADATA_KEY), transaction.stat()["entries"]
        if metadata is None and (known or num_entries):
            raise _damaged(self.folder, "data.mdb has lost its metadata")
        if metadata is not None and metadata != _json_bytes(self._metadata):
            raise _damaged(self.folder, "it holds the hidden states of another backbone, see its fingerprint.json")
        if self.readonly:
            return
        if metadata is None:
            with environment.begin(write=True) as transaction:
                transaction.put(METADATA_KEY, _json_bytes(self._metadata), overwrite=False)
        if not known:
            (self.folder / "fingerprint.json").write_text(json.dumps(self._metadata, indent=2) + "\n")

    def close(self) -> None:
        """Let go of the environment, which closes with its last user; a later call opens it again."""
        environment, self._environment = self._environment, None
        if environment is not None and self._shared_environment() is None:
            environment.close()  # dropping it is not enough: the traceback of an error may keep it alive

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_environment": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _caches.add(self)


_caches: WeakSet[FeatureCache] = WeakSet()


def _forget_environments() -> None:
    """In a forked child. Dropping is safe, closing is not: that would free the parent's slots in the reader table."""
    for cache in _caches:
        cache._environment = None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_environments)


def _open_lmdb(folder: Path) -> lmdb.Environment:
    writable = os.access(folder, os.W_OK)  # the lock file too must be written, so a read-only folder goes without it
    # Without metasync a power cut may undo the last batch, never harm earlier ones.
    options: dict[str, Any] = dict(max_readers=512, metasync=False, readonly=not writable, lock=writable)
    map_bytes = MAP_BYTES
    while map_bytes > MIN_MAP_BYTES:
        try:
            return lmdb.open(str(folder), map_size=map_bytes, **options)
        except lmdb.MemoryError:  # the address space is limited (`ulimit -v`, some containers)
            map_bytes //= 2
    return lmdb.open(str(folder), map_size=map_bytes, **options)


def _json_bytes(metadata: dict[str, Any]) -> bytes:
    return json.dumps(metadata, sort_keys=True).encode()


def _damaged(folder: Path, detail: str) -> RuntimeError:
    fix = "delete this folder and run `hybrid embed` again"
    return RuntimeError(f"feature store {folder} is damaged ({detail}): {fix}")


@contextmanager
def _one_line_errors(folder: Path) -> Generator[None]:
    """Turn what LMDB and the file system raise into one line that names the folder and the fix."""
    try:
        yield
    except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError, lmdb.VersionMismatchError) as error:
        raise _damaged(folder, str(error)) from error
    except (lmdb.Error, OSError) as error:
        if isinstance(error, lmdb.MapFullError):
            fix = "the address space is limited: raise `ulimit -v`"
        elif isinstance(error, lmdb.DiskError) or any(text in str(error) for text in FULL):
            fix = "the disk is probably full: free some space, or move the folder and set features.folder"
        elif isinstance(error, (lmdb.ReadonlyError, OSError)):
            fix = "check the folder's permissions, or set features.folder to another folder"
        else:
            fix = "stop other users of this store"
        message = f"feature store {folder}: {error}; {fix}, then run again. Nothing stored before is lost"
        raise RuntimeError(message) from error


def fill_cache(
    cache: FeatureCache,
    backbone: Backbone,
    texts: Sequence[tuple[str | None, str]],
    token_budget: int,
    progress: bool = True,
) -> int:
    """Compute and store the hidden states of those texts that the cache lacks.

    Args:
        cache: Store of this backbone's fingerprint.
        backbone: The frozen model.
        texts: Context (or `None`) and question of each text that is read as one (`Backbone.parts`); those that repeat
            are computed once.
        token_budget: Tokens in one pass of the backbone, padding included.
        progress: Show a bar that counts tokens.

    Returns:
        How many texts were computed.
    """
    keys = [text_key(context, question) for context, question in texts]
    missing = cache.missing(keys)
    if not missing:
        return 0
    prompts = backbone.prompts([texts[index] for index in missing])  # all of them: bad texts fail before the long work
    lengths = [len(prompt.token_ids) for prompt in prompts]
    batches = length_batches(lengths, token_budget)

    def compute(batch: list[int]) -> list[Tensor]:
        return backbone.hidden_states([prompts[index] for index in batch])

    if backbone.device.type == "cpu":
        if sum(lengths) >= COMPILED_TOKENS:
            backbone.compile()
        states = map_in_threads(compute, batches)
    else:
        states = (compute(batch) for batch in batches)
    bar = tqdm(total=sum(lengths), desc="hidden states", unit="tok", unit_scale=True, disable=not progress)
    with bar, closing(states):
        for batch, batch_states in zip(batches, states, strict=True):
            chosen = [prompts[index] for index in batch]
            token_ids = [torch.tensor(prompt.memory_ids) for prompt in chosen]
            features = map(Features, token_ids, batch_states)
            cache.write(zip((keys[missing[index]] for index in batch), features, strict=True))
            bar.update(sum(lengths[index] for index in batch))
    return len(missing)
