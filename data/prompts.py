"""How an instruction becomes the tokens that a policy reads: PaliGemma's own way, and those of pi0 and pi0.5.

Shape letters: B batch, S state_dim.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data.decoding import ObservationError
from utils.backbones import BACKBONE_SPECS
from utils.config_utils import Config
from utils.foreign_files import check_processor_folder
from utils.hub import hub_options
from utils.normalization import StateNormalizer
from utils.text import printable

logger = logging.getLogger(__name__)

PromptFormat = Literal["paligemma", "pi0", "openpi_pi0", "pi05"]

MAX_UNREAD = 80  # characters that a warning quotes of what a policy does not read
MAX_KNOWN_PROMPTS = 4096  # tokenized instructions that are kept; a server may be sent any number of them
BIN_EDGES = np.linspace(-1, 1, 257)[:-1]  # left edges of 256 bins, float64


def prompt_texts(prompt: str, prompt_format: PromptFormat, state_bins: Sequence[int] | None = None) -> tuple[str, ...]:
    """The texts that are tokenized one after the other, without the token that a prompt starts with.

    `paligemma`: white space made single, a closing newline. `pi0` (LeRobot): as written, a closing newline unless
    there is one. `openpi_pi0`: "_" and newlines become spaces, and the closing newline is a text of its own. `pi05`
    (both libraries): the instruction and the state's bins in a sentence that ends in `Action: `.

    Args:
        prompt: the instruction as written.
        prompt_format: one of the four.
        state_bins: for `pi05`, from `state_bins`.
    """
    if prompt_format == "paligemma":
        return (" ".join(prompt.split()) + "\n",)
    if prompt_format == "pi0":
        return (prompt if prompt.endswith("\n") else f"{prompt}\n",)
    cleaned = prompt.strip().replace("_", " ").replace("\n", " ")
    if prompt_format == "openpi_pi0":
        return cleaned, "\n"
    assert state_bins is not None, "pi0.5's prompt says the state"
    return (f"Task: {cleaned}, State: {' '.join(map(str, state_bins))};\nAction: ",)


def state_bins(state: np.ndarray) -> np.ndarray:
    """The bins of normalized states as pi0.5's prompt gives them, int64 of the same shape.

    256 bins of equal width from -1 on; nothing is clipped but what comes: below -1 is bin -1, and everything from
    127/128 on is bin 255.

    Args:
        state: float32, normalized and not padded.
    """
    return np.digitize(state, bins=BIN_EDGES) - 1


class PromptTokenizer:
    """Turns an instruction into text tokens: a prefix, then the text of its format (`prompt_texts`).

    The prefix is what the backbone was pretrained with: `<bos>` for PaliGemma; for other language models whatever
    their tokenizer itself puts in front of a text (`<s>` for Llama, nothing for Qwen). No padding token is needed,
    for padding is masked. Image tokens are not part of it: they are the backbone's affair.
    """

    def __init__(
        self, tokenizer: Any, max_len: int, backbone: str = "paligemma", prompt_format: PromptFormat = "paligemma"
    ) -> None:
        """
        Args:
            tokenizer: of transformers.
            max_len: tokens, the prefix included.
            backbone: `model.vlm_config.type`.
            prompt_format: `data.prompt_format`. One that says the state needs `read_states` before the first prompt.
        """
        self.tokenizer, self.max_len, self.prompt_format = tokenizer, max_len, prompt_format
        self.normalize_state: StateNormalizer | None = None
        starts_with_bos = BACKBONE_SPECS[backbone].prompt_start == "bos"
        self.prefix = [tokenizer.bos_token_id] if starts_with_bos else _own_prefix(tokenizer)
        self._known: dict[tuple[str, ...], tuple[Tensor, str | None]] = {}  # tokens, and what is said of a cut
        self._warned = False

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, max_len: int, backbone: str = "paligemma", prompt_format: PromptFormat = "paligemma"
    ) -> PromptTokenizer:
        """Load the tokenizer of a Hugging Face directory or hub id.

        Raises:
            ObservationError: no tokenizer there, or for PaliGemma one without a `<bos>` token.
        """
        from transformers import AutoTokenizer

        try:
            check_processor_folder(Path(name_or_path))
            tokenizer = AutoTokenizer.from_pretrained(
                name_or_path, trust_remote_code=False, **hub_options(name_or_path)
            )
        except Exception as error:  # its Rust part raises the bare class, its Python part any other
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ObservationError(
                f"tokenizer: none at {name_or_path!r} ({reason}); set data.tokenizer_name_or_path to a directory or "
                "hub id that has one"
            ) from None
        if BACKBONE_SPECS[backbone].prompt_start == "bos" and tokenizer.bos_token_id is None:
            raise ObservationError(
                f"tokenizer at {name_or_path!r} has no <bos> token, which the prompt of a {backbone} needs"
            )
        return cls(tokenizer, max_len, backbone, prompt_format)

    @classmethod
    def from_files(
        cls,
        files: dict[str, Tensor],
        max_len: int,
        backbone: str = "paligemma",
        prompt_format: PromptFormat = "paligemma",
    ) -> PromptTokenizer:
        """Load from the tokenizer files that a checkpoint carries (name -> uint8 content)."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / Path(name).name).write_bytes(content.numpy().tobytes())
            return cls.from_pretrained(folder, max_len, backbone, prompt_format)

    def reads_like(self, other: PromptTokenizer) -> bool:
        """Whether every instruction becomes the same tokens as with another one, lengths and formats aside."""
        return self.prefix == other.prefix and _rules(self.tokenizer) == _rules(other.tokenizer)

    def to_files(self) -> dict[str, Tensor]:
        """The tokenizer's files as a checkpoint carries them (name -> uint8 content)."""
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            return {
                path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
                for path in sorted(Path(folder).iterdir())
                if path.is_file()
            }

    @property
    def reads_state(self) -> bool:
        """Whether the prompt says the state, so that it is another at every step."""
        return self.prompt_format == "pi05"

    def read_states(self, config: Config, statistics: Sequence[dict[str, Any]]) -> None:
        """Normalize the states that prompts say by these statistics, one per dataset; nothing for other formats."""
        if self.reads_state:
            self.normalize_state = StateNormalizer(config.data, statistics, config.datasets)

    def __call__(self, prompt: str, state: np.ndarray | None = None, dataset_index: int = 0) -> list[int]:
        """Token ids of one instruction, at most `max_len`; a longer one is cut with one warning.

        Args:
            prompt: the instruction as written.
            state: float32 (state_dim,), physical units, padded to the model's width; read where `reads_state`.
            dataset_index: whose statistics the state is normalized by.

        Raises:
            ObservationError: the prompt is empty, or no text.
        """
        cut = self.cut(prompt, state, dataset_index)
        if cut is not None and not self._warned:
            self._warned = True
            logger.warning("%s", cut)
        return self.tensor(prompt, state, dataset_index).tolist()

    def tensor(self, prompt: str, state: np.ndarray | None = None, dataset_index: int = 0) -> Tensor:
        """The same as int64 (L,), made once per text and not to be changed; warns of nothing, see `cut`."""
        return self._tokens(prompt, state, dataset_index)[0]

    def cut(self, prompt: str, state: np.ndarray | None = None, dataset_index: int = 0) -> str | None:
        """What of an instruction the policy does not read, as a warning; None where it reads all."""
        return self._tokens(prompt, state, dataset_index)[1]

    def _tokens(self, prompt: str, state: np.ndarray | None, dataset_index: int) -> tuple[Tensor, str | None]:
        if not isinstance(prompt, str):
            found = "missing" if prompt is None else f"a {type(prompt).__name__}"
            raise ObservationError(f"prompt is {found}; wanted the instruction as text")
        if not prompt.strip():
            raise ObservationError(f"prompt is {prompt!r}; a policy needs an instruction")
        bins = None
        if self.reads_state:
            assert self.normalize_state is not None and state is not None, "read_states comes before the first prompt"
            bins = state_bins(self.normalize_state(state, dataset_index)).tolist()
        texts = prompt_texts(prompt, self.prompt_format, bins)
        known = self._known.get(texts)
        if known is None:
            known = self._encode(texts)
            while len(self._known) >= MAX_KNOWN_PROMPTS:
                # The oldest, from a copy: another thread of a server may change the dict meanwhile.
                self._known.pop(next(iter(list(self._known)), None), None)
            self._known[texts] = known
        return known

    def _encode(self, texts: tuple[str, ...]) -> tuple[Tensor, str | None]:
        ids = list(self.prefix)
        for text in texts:
            ids += self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) <= self.max_len:
            return torch.tensor(ids, dtype=torch.int64), None
        end = ids[-1:] if self.prompt_format == "paligemma" else []  # which always ends in its newline
        kept = ids[: self.max_len - len(end)]
        unread = printable(self.tokenizer.decode(ids[len(kept) :]).strip(), MAX_UNREAD)
        cut = (
            f"prompt of {len(ids)} tokens cut to data.prompt_max_len {self.max_len}: the policy does not read its end "
            f"{unread!r}; shorten it, or train with a larger prompt_max_len ({''.join(texts).strip()!r})"
        )
        return torch.tensor([*kept, *end], dtype=torch.int64), cut


def _own_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts in front of a text."""
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def _rules(tokenizer: Any) -> Any:
    """What decides which tokens a text becomes: comparable by value."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}
