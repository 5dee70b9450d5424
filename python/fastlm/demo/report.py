"""The demo's `report.html`: one file, no scripts, nothing from outside, light and dark."""

from __future__ import annotations

from html import escape
from pathlib import Path

from fastlm.demo.result import DemoResult
from fastlm.demo.svg import Bar, Level, Series, bar_chart, line_chart

SMOOTHED_STEPS = 25

STYLE = Path(__file__).with_name("report.css")


def render(result: DemoResult) -> str:
    """The whole page."""
    parts = [
        _head(result),
        _cards(result),
        _quality(result),
        _curve(result),
        _speed(result),
        _samples(result),
    ]
    parts += [_caveats(result), _machine(result)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width">'
        f"<title>fastlm "
        f"demo</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(result: DemoResult) -> str:
    source = "the source of Python's own library" if result.data["is_stdlib"] else result.data["source"]
    form = (
        " This is the quick form: everything is far shorter than it should be to learn well."
        if result.quick
        else ""
    )
    return (
        "<h1>A language model, trained here</h1>"
        f'<p class="lead">Samba ({result.parameters / 1e6:.1f} million parameters: Mamba and sliding-window '
        f"attention in turn) "
        f"learned from {escape(source)} for {result.train_seconds:.0f} seconds on {result.threads} CPU "
        f"{'thread' if result.threads == 1 else 'threads'}. Everything on this page was measured in that "
        f"run.{form}</p>"
    )


def _cards(result: DemoResult) -> str:
    cards = [(f"{result.bits_per_byte:.3f}", "bits per byte of held-out text")]
    cards.append((f"{result.tokens_per_second:,.0f}", "tokens per second while training"))
    for peer in result.peers[1:]:
        ratio = result.speed_up(peer.name)
        if ratio is not None:
            cards.append(
                (
                    f"{ratio:.1f}×",
                    f"the training speed of the {peer.name}"
                    if "loop" in peer.name
                    else f"the speed of {peer.name}",
                )
            )
    cards.append((f"{result.peak_memory_bytes / 2**20:,.0f} MiB", "peak memory of the training process"))
    return (
        '<div class="cards">'
        + "".join(f"<div class=card><b>{b}</b><span>{escape(t)}</span></div>" for b, t in cards)
        + "</div>"
    )


def _quality(result: DemoResult) -> str:
    bars = [
        Bar(
            "fastlm Samba",
            result.bits_per_byte,
            f"{result.bits_per_byte:.3f}",
            own=True,
            note="after the training text",
        )
    ]
    for c in result.compressors:
        bars.append(
            Bar(
                c.name,
                c.bits_per_byte,
                f"{c.bits_per_byte:.3f}",
                note="" if c.seen == "nothing else" else f"reads {c.seen}",
            )
        )
    names = len(result.data["held_out_names"])
    return (
        "<section><h2>Held-out text: bits per byte</h2>"
        f"<p>{result.held_out_bytes:,} bytes of {names} files that were never trained on; less is better. "
        f"The compressors get the "
        "very same bytes in one stream. The model's number is what an arithmetic coder driven by it would "
        "need.</p>"
        f"{bar_chart(bars)}</section>"
    )


def _curve(result: DemoResult) -> str:
    values = [value for _, value in result.curve]
    smooth: list[tuple[float, float]] = []
    width = min(SMOOTHED_STEPS, max(1, len(values) // 8))
    for index, (tokens, _) in enumerate(result.curve):
        window = values[max(0, index - width + 1) : index + 1]
        smooth.append((tokens, sum(window) / len(window)))
    series = [
        Series("each step", [(float(x), y) for x, y in result.curve], "faint"),
        Series("training", smooth, "other"),
        Series("held-out", [(float(x), y) for x, y in result.held_out_curve], "own", dots=True),
    ]
    levels = [
        Level(c.name.split(",")[0].split(" ")[0], c.bits_per_byte)
        for c in result.compressors
        if c.seen == "nothing else"
    ]
    chart = line_chart(series, levels, x_label="tokens read", y_label="bits per byte")
    return (
        "<section><h2>Learning</h2><p>Loss over the tokens read, in bits per byte; gzip and xz as level "
        "lines. The dots are "
        "evaluations on held-out text (a fixed part of it, the last one on all of it).</p>"
        f"{chart}</section>"
    )


def _speed(result: DemoResult) -> str:
    rows, length = result.batch
    bars, cells = [], []
    for index, peer in enumerate(result.peers):
        rate = peer.tokens_per_second
        ratio = "" if index == 0 or rate is None else f"fastlm is {result.speed_up(peer.name):.1f}×"
        if rate is not None:
            bars.append(Bar(peer.name, rate, f"{rate:,.0f}", own=index == 0, note=ratio))
        memory = f"{peer.peak_bytes / 2**20:,.0f} MiB" if peer.peak_bytes else "–"
        timed = (
            f"{min(peer.step_seconds):.3g} – {max(peer.step_seconds):.3g} s"
            if peer.step_seconds
            else escape(peer.problem or "–")
        )
        cells.append(
            f"<tr><td>{escape(peer.name)}<br><small>{escape(peer.what)}</small></td><td class=n>{timed}</td>"
            f"<td class=n>{len(peer.step_seconds)}</td><td class=n>{memory}</td><td "
            f"class=n>{peer.loss:.5f}</td></tr>"
        )
    return (
        "<section><h2>Training speed: tokens per second</h2>"
        f"<p>Whole training steps (forward, backward, AdamW) of the trained model in {result.dtype} on one "
        f"batch of {rows} × {length} tokens: same weights, same tokens, same arithmetic. Losses and gradients "
        "in fp32 were compared first; one that differs is not timed.</p>"
        f"{bar_chart(bars)}<div class=scroll><table><tr><th>form</th><th class=n>seconds a step</th><th "
        f"class=n>steps</th>"
        f"<th class=n>memory of a step</th><th class=n>loss</th></tr>{''.join(cells)}</table></div></section>"
    )


def _samples(result: DemoResult) -> str:
    shown = "".join(f"<pre><b>{escape(s.prompt)}</b>{escape(s.text)}</pre>" for s in result.samples)
    return (
        f"<section><h2>What it writes</h2><p>Sampled at {result.generation_tokens_per_second:,.0f} tokens "
        f"per second; the prompts are "
        f"in colour. Minutes of training give the look of the language, not its sense.</p>{shown}</section>"
    )


def _caveats(result: DemoResult) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in result.caveats())
    return (
        f'<section class="lost"><h2>What was lost, and what this does not show</h2><ul>{items}</ul></section>'
    )


def _machine(result: DemoResult) -> str:
    environment, data = result.environment, result.data
    versions = ", ".join(f"{name} {value}" for name, value in environment["versions"].items() if value)
    facts = {
        "machine": f"{environment['machine']}, {environment['cpus']} CPUs, {environment['platform']}",
        "CPU level": environment["cpu_capability"],
        "versions": f"Python {environment['python']}, {versions}",
        "text": f"{data['train_files']} files, {data['train_bytes'] / 1e6:.1f} MB, {data['train_tokens']:,} "
        f"tokens; held out {data['held_out_files']} files; digest {data['digest'][:16]}",
        "model": f"preset {result.preset}, {result.parameters:,} parameters, "
        f"vocabulary {data['vocab_size']}, {result.dtype}",
        "training": f"{result.train_steps} steps, {result.train_tokens:,} tokens, "
        f"{result.train_seconds:.0f} s",
        "git commit": environment["git_commit"] or "–",
        "again with": result.command,
    }
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return (
        f"<section><h2>Machine and versions</h2><dl>{rows}</dl></section>"
        f"<footer>{escape(result.created)} · whole demo {result.seconds:.0f} s · numbers in demo.json "
        f"beside this file</footer>"
    )
