r"""The paper's claims as named experiments, each with a verdict beside the paper's own figures.

    python -m posteriori.bench.claims --rows runs/lfw-32-benchmark/rows.jsonl --rows runs/lfw-32-claims/rows.jsonl \
      --ablation docs/ablation.md --ablation docs/finetune.md [--cost runs/cost/rows.jsonl] \
      --paper FILE --paper-set ffhq-64 --document docs/results/lfw-32/verdicts.md

Nothing is measured here: rows of the image benchmark, of the cost benchmark and of the comparisons of trainings go in,
and a table of verdicts comes out. The rules are the docstrings of the functions that judge
(:mod:`posteriori.bench.claims_tables`, ``claims_sampling``, ``claims_training``); what is compared and how, and when a
claim holds, is not decided after the figures are seen. All rows are of one test set and one model of each method.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posteriori.bench import claims_sampling, claims_tables, claims_training
from posteriori.bench.claims_common import FEW, Claim, Evidence, Verdict, read_rows
from posteriori.bench.common import markdown_table, say
from posteriori.bench.images_report import read_paper
from posteriori.checkpoint import write_atomically

__all__ = ["CLAIMS", "document", "judge", "main"]

CLAIMS: tuple[Claim, ...] = (*claims_tables.CLAIMS, *claims_sampling.CLAIMS, *claims_training.CLAIMS)


def judge(evidence: Evidence, only: Sequence[str] = ()) -> list[Verdict]:
    """Verdicts of all claims, or of those named.

    Raises:
        ValueError: on an unknown name.
    """
    known = {c.id: c for c in CLAIMS}
    if unknown := sorted(set(only) - set(known)):
        raise ValueError(f"unknown claim {', '.join(unknown)}: choose among {', '.join(known)}")
    return [c.verdict(evidence) for c in CLAIMS if not only or c.id in only]


def _summary(verdicts: Sequence[Verdict]) -> str:
    header = ["claim", "", "paper's own figures", "here", "verdict"]
    rows = [[f"[{v.id}](#{v.id})", v.claim, v.paper, v.ours, f"**{v.state}**"] for v in verdicts]
    return markdown_table(header, [[str(c).replace("|", "/") for c in row] for row in rows], names=5)


def _section(verdict: Verdict, command: str, run: str) -> str:
    lines = [f"## {verdict.id}", "", f"{verdict.claim}: **{verdict.state}**. {verdict.reason}.", ""]
    lines += [verdict.rule, "", f"Paper: {verdict.paper}.", ""]
    if verdict.parts:
        rows = [[p.name, p.text, p.state] for p in verdict.parts]
        lines += [markdown_table(["comparison", "figures", "verdict"], rows, names=3), ""]
    if verdict.note:
        lines += [verdict.note.rstrip(".") + ".", ""]
    commands = [*verdict.commands.replace("{run}", run).split("\n"), f"{command} --only {verdict.id}"]
    return "\n".join([*lines, *[f"    {line}" for line in commands]])


def document(verdicts: Sequence[Verdict], evidence: Evidence, command: str, run: str) -> str:
    """Markdown: what was measured, the table of verdicts, and for every claim its rule, figures and commands."""
    first = evidence.rows[0] if evidence.rows else {}
    of = ""
    if first:
        images = len({r["first"] + i for r in evidence.rows for i in range(r["images"])})
        size, noise = first.get("size", "?"), first.get("sigma_y", "?")
        of = f" {images} test images of {size}x{size} pixels, noise {noise}, {len(evidence.rows)} rows."
    counts = {s: sum(v.state == s for v in verdicts) for s in ("holds", "does not hold", "undecided", "not measured")}
    counted = ", ".join(f"{n} {s}" for s, n in counts.items() if n)
    source = evidence.paper.get("source", "")
    beside = f" Beside: {source}, its tables of {evidence.paper_set}." if source else ""
    head = HEAD.format(of=of, beside=beside, few=FEW, counted=counted)
    return "\n\n".join([head, _summary(verdicts), *[_section(v, command, run) for v in verdicts]]) + "\n"


def evidence_of(args: argparse.Namespace) -> Evidence:
    """What the command line names.

    Raises:
        ValueError: when a file cannot be used.
    """
    rows, features = read_rows(args.rows)
    cost: list[dict[str, Any]] = []
    for path in args.cost:
        try:
            cost += [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}): give rows of the cost benchmark") from None
    training = claims_training.read_training(args.ablation)
    paper = read_paper(str(args.paper), args.paper_set) if args.paper else {}
    known: dict[str, dict[str, float]] = {}
    for path in args.rows:
        if (sets := path.parent / "sets.json").exists():
            known |= json.loads(sets.read_text())
    return Evidence(rows, features, known, cost, training, paper, args.paper_set)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 2 for files that cannot be used."""
    parser = argparse.ArgumentParser("python -m posteriori.bench.claims", description=(__doc__ or "").split("\n")[0])
    many: dict[str, Any] = {"type": Path, "action": "append", "default": []}
    parser.add_argument(
        "--rows",
        **many,
        help="rows.jsonl or rows.jsonl.gz of an image benchmark, its features or sets.json beside it; repeatable",
    )
    parser.add_argument("--cost", **many, help="rows.jsonl of the cost benchmark; repeatable")
    parser.add_argument("--ablation", **many, help="results.jsonl or table of ablation and finetune; repeatable")
    parser.add_argument("--paper", type=Path, help="JSON file with a paper's tables")
    parser.add_argument("--paper-set", default="ffhq-64", help="the set in it")
    parser.add_argument("--recipes", default="lfw-32", help="name that the recipes of the commands begin with")
    parser.add_argument("--only", default="", help="names of claims, separated by commas")
    parser.add_argument("--document", type=Path, help="Markdown file to write")
    args = parser.parse_args(arguments)
    try:
        evidence = evidence_of(args)
        verdicts = judge(evidence, [n for n in args.only.split(",") if n])
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    width = max(len(v.id) for v in verdicts)
    for v in verdicts:
        say(f"{v.id:{width}}  {v.state:13}  {v.ours}: {v.reason}\n{'':{width}}  paper          {v.paper}")
    if args.document:
        given = [f"--{k} {p}" for k in ("rows", "cost", "ablation") for p in getattr(args, k)]
        given += [f"--paper FILE --paper-set {args.paper_set}"] if args.paper else []
        command = " ".join(["python -m posteriori.bench.claims", *given])
        write_atomically(args.document, document(verdicts, evidence, command, args.recipes).encode())
    return 0


HEAD = """# The paper's claims, judged

{counted}.{of}{beside}

Each claim has a rule and is judged by rows of the benchmarks. The rules' bounds were set before rows of the image
benchmark were seen; how few images may be judged, which variants count as methods, and that means are compared at equal
numbers of samples was settled on seeing its first ones. The figures of ablation and fine-tuning are older than the
rules. Methods are compared on the same images and measurements, with a 95 % interval from a bootstrap over images (at
least {few}), in square brackets. A comparison holds when its interval is within the bound, does not hold when it is
outside, and is undecided when the bound is inside. A claim holds when all of its comparisons do, and does not when one
does not. The networks are far smaller here than the paper's, and so are the images: a verdict is on the claim in this
setting."""


if __name__ == "__main__":
    sys.exit(main())
