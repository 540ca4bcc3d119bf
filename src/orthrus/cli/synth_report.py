"""What `orthrus synth` says of the corpus that it made."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthrus.training.synth import SynthConfig


def synth_report(folder: Path, config: "SynthConfig") -> dict[str, Any]:
    """Counts of a corpus. begun: prompts that the model was to make itself, of which it made `made`; answers_wanted:
    of all prompts, with every turn."""
    from orthrus.training.corpus import left_out, read_corpus, read_prompts, read_source, source_path

    domains: dict[str, dict[str, int]] = {}
    dialogues = answers = prompt_tokens = longest = num_prompts = wanted = 0
    for prompt in read_prompts(folder):
        num_prompts += 1
        wanted += config.turns or 1 + len(prompt.get("turns", []))
    for sample in read_corpus(folder):
        entry = domains.setdefault(sample.domain, {"dialogues": 0, "answer_tokens": 0})
        entry["dialogues"] += 1
        entry["answer_tokens"] += sample.num_answered
        dialogues, answers = dialogues + 1, answers + len(sample.answer_spans)
        prompt_tokens += len(sample.prompt_ids)
        longest = max(longest, len(sample.prompt_ids) + len(sample.answer_ids))
    own = [i for i, source in enumerate(config.sources) if source.file is None and source.dataset is None]
    return {
        "path": str(folder),
        "prompts": num_prompts,
        "begun": sum(config.sources[i].count or 0 for i in own),
        "made": sum(len(read_source(source_path(folder, i))) for i in own),
        "dialogues": dialogues,
        "dropped": num_prompts - dialogues,
        "left_out": left_out(folder),
        "answers": answers,
        "answers_wanted": wanted,
        "prompt_tokens": prompt_tokens,
        "answer_tokens": sum(entry["answer_tokens"] for entry in domains.values()),
        "longest": longest,
        "domains": dict(sorted(domains.items())),
    }


def as_text(report: dict[str, Any]) -> str:
    """The report as lines."""
    lines = [
        f"corpus in {report['path']}: {report['dialogues']:,} dialogues, {report['answer_tokens']:,} answer "
        f"tokens (the longest dialogue has {report['longest']} tokens)"
    ]
    lines += [
        f"  {domain:<12} {entry['dialogues']:>7,} dialogues {entry['answer_tokens']:>10,} answer tokens"
        for domain, entry in report["domains"].items()
    ]
    if report["made"] < report["begun"]:
        lines.append(
            f"  the model made {report['made']:,} of {report['begun']:,} prompts: the others were cut off, too short "
            "or repeated themselves"
        )
    if in_circles := report["dropped"] - sum(report["left_out"].values()):
        lines.append(f"  {in_circles:,} answers repeated themselves and were left out")
    if report["answers_wanted"] > report["prompts"] and report["answers"] < report["answers_wanted"]:
        lines.append(
            f"  {report['answers']:,} of {report['answers_wanted']:,} answers were given: a dialogue ends at an answer "
            "that was cut off (--max-new-tokens) or repeated themselves, and where it is too long to go on"
        )
    lines += [
        f"  {number:,} answers of the server were left out: {why}"
        for why, number in report["left_out"].items()
    ]
    return "\n".join(lines) + "\n"
