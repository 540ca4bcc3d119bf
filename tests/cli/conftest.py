"""A tiny model folder with a byte tokenizer, and the command line called in this process."""

import io
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from orthrus.cli.app import main

from .training_files import SYNTH, write_prompts, write_recipe

SPECIALS = ("<pad>", "<bos>", "<eos>")
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIALS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast


def write_model(
    folder: Path,
    *,
    hidden_size: int = 32,
    seed: int = 0,
    template: str | None = TEMPLATE,
    config_class: type[PreTrainedConfig] = LlamaConfig,
) -> Path:
    """A random two-layer model with its tokenizer."""
    tokenizer = byte_tokenizer(template)
    config = config_class(
        vocab_size=len(tokenizer) + 1,
        hidden_size=hidden_size,
        head_dim=hidden_size // 4,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
        model.get_output_embeddings().weight.mul_(2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_wait_for_idle_power(monkeypatch: pytest.MonkeyPatch) -> None:
    """`orthrus bench` measures it for ten seconds where there are counters."""
    monkeypatch.setattr("orthrus.cli.bench._ENERGY_S", 0.0)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Other shapes, and no chat template."""
    folder = tmp_path_factory.mktemp("models") / "other"
    return str(write_model(folder, hidden_size=48, seed=1, template=None))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> str:
    folder = tmp_path_factory.mktemp("corpora")
    prompts = write_prompts(folder / "prompts.jsonl")
    command = [
        sys.executable,
        "-m",
        "orthrus.cli.app",
        "synth",
        str(folder / "corpus"),
        "--model",
        model_folder,
    ]
    subprocess.run([*command, "--prompts", prompts, *SYNTH], check=True, capture_output=True)
    return str(folder / "corpus")


@pytest.fixture
def recipe(tmp_path: Path, corpus: str, model_folder: str) -> str:
    output = str(tmp_path / "run")
    return write_recipe(tmp_path / "recipe.yaml", base=model_folder, corpus=corpus, output=output)


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


Cli = Callable[..., Run]


class Terminal(io.StringIO):
    """Stands for a keyboard."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Call `orthrus ARGS...`; what is on stdin, or nothing, comes as an argument."""

    def run(*args: str, stdin: str = "", tty: bool = False) -> Run:
        monkeypatch.setattr(sys, "stdin", Terminal(stdin) if tty else io.StringIO(stdin))
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit) as leaving:
            main(list(args))
        assert signal.getsignal(signal.SIGINT) is before
        captured = capsys.readouterr()
        return Run(int(leaving.value.code or 0), captured.out, captured.err)

    return run


def assert_refused(run: Run, *words: str) -> None:
    """One sentence on stderr, nothing on stdout, exit status 2."""
    assert run.code == 2
    assert run.out == ""
    errors = [line for line in run.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in run.err
    for word in words:
        assert word in errors[0]
