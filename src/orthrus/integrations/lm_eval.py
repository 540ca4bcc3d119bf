"""lm-evaluation-harness asks Orthrus: `lm_eval run --model orthrus --tasks ...`.

Where the harness reads no entry points (0.4.13 does not), `python -m orthrus.integrations.lm_eval run --model
orthrus ...` is the same command with the model registered. Texts come from our engine, log-likelihoods from
the stock model over the same weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from orthrus.api import Orthrus, decode_config
from orthrus.config import DecodeConfig
from orthrus.errors import UserInputError

DEFAULT_NEW_TOKENS = 256
_IGNORED = {"do_sample", "temperature", "until", "max_gen_toks"}
_TAKEN = ("top_k", "top_p", "min_p", "repetition_penalty")


@register_model("orthrus")
class OrthrusLM(TemplateLM):
    """Orthrus as a model of the harness.

    pretrained, view, dtype, device, runner: as in `Orthrus.load`. strategy: as in `orthrus.api.decode_config`;
    "ar" is the base-against-base column. seed: of sampled texts; text number n uses seed + n. batch_size:
    texts that share the passes. max_gen_toks: where a task names none.
    """

    def __init__(
        self,
        pretrained: str = "default",
        view: str = "default",
        strategy: str = "auto",
        dtype: str | None = None,
        device: str | None = None,
        runner: str | None = None,
        batch_size: int | str = 1,
        max_gen_toks: int = DEFAULT_NEW_TOKENS,
        seed: int = 0,
        orthrus: Orthrus | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)
        if unknown:
            raise UserInputError(
                f"model_args has no '{next(iter(unknown))}'; see OrthrusLM for those it has."
            )
        self._orthrus = orthrus or Orthrus.load(pretrained, view, dtype, device, runner=runner)
        self._strategy, self._seed, self._new_tokens = strategy, int(seed), int(max_gen_toks)
        self.batch_size = 1 if batch_size == "auto" else int(batch_size)
        self.tokenizer = self._orthrus.base.tokenizer

    @property
    def eot_token_id(self) -> int:
        ends = self._orthrus.base.eos_token_ids
        own = getattr(self.tokenizer, "eos_token_id", None)
        return int(own if own is not None else next(iter(ends), 0))

    @property
    def tokenizer_name(self) -> str:
        return str(self._orthrus.base.name).replace("/", "__")

    @property
    def max_length(self) -> int:
        return int(self._orthrus.base.context_length)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of text as it stands; add_special_tokens False: without a start token."""
        tokenizer: Any = self.tokenizer
        if add_special_tokens is None and string.strip():
            return self._orthrus.base.encode_prompt(string, raw=True)
        ids = tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]
        return list(ids)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of the messages; without a generation prompt the last one is to be continued."""
        tokenizer: Any = self.tokenizer
        return str(
            tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        model: Any = self._orthrus.stock()
        found = []
        for key, context_ids, new_ids in requests:
            ids = (context_ids + new_ids)[-(self.max_length + 1) :]
            num = min(len(new_ids), len(ids) - 1)
            ids_1T = torch.tensor([ids[:-1]], device=self._orthrus.dual.device)
            logits_NV = model(input_ids=ids_1T, logits_to_keep=num).logits[0].float()
            target_N = torch.tensor(ids[len(ids) - num :], device=logits_NV.device)
            log_probs_N = logits_NV.log_softmax(-1).gather(-1, target_N[:, None])[:, 0]
            answer = float(log_probs_N.sum()), bool((logits_NV.argmax(-1) == target_N).all())
            found.append(answer)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows as long as the context."""
        found = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(
                token_list=ids,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(answer[0] for answer in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The new text of each request, up to the first of its stop strings."""
        found: list[str] = []
        for start in range(0, len(requests), self.batch_size):
            some = requests[start : start + self.batch_size]
            streams = []
            for number, request in enumerate(some, start=start):
                context, settings = request.args
                config = self._config(dict(settings), number)
                ids = self.tok_encode(context)
                room = max(1, self.max_length - config.max_new_tokens)
                streams.append(self._orthrus.stream_ids(ids[-room:], config))
            for request, stream in zip(some, streams, strict=True):
                text = stream.drain().text
                found.append(text)
                self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    def _config(self, settings: dict[str, Any], number: int) -> DecodeConfig:
        """What the harness asks for, in our words; UserInputError for a setting that we do not have."""
        temperature = float(settings.get("temperature") or 0.0)
        if settings.get("do_sample") is False:
            temperature = 0.0
        elif settings.get("do_sample") and not temperature:
            temperature = 1.0
        until = settings.get("until") or ()
        if unknown := [name for name in settings if name not in _IGNORED and name not in _TAKEN]:
            raise UserInputError(
                f"the task's generation_kwargs has '{unknown[0]}', which Orthrus does not have."
            )
        filters = {name: settings[name] for name in _TAKEN if name in settings}
        return decode_config(
            strategy=self._strategy,  # type: ignore[arg-type]
            max_new_tokens=int(settings.get("max_gen_toks") or self._new_tokens),
            temperature=temperature,
            seed=self._seed + number,
            stop=[until] if isinstance(until, str) else [text for text in until if text],
            **filters,
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
