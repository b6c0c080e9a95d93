"""What each verb has to say, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from xadapt.layer_names import grouped, merged, wording_of

from . import charts

Part = Mapping[str, Any]

_MEASURES = {
    "weight_drift": "weight drift",
    "weight_cosine": "weight cosine",
    "inputs_overlap": "input subspace",
    "outputs_overlap": "output subspace",
    "update_share": "‖ΔW‖/‖W‖",
    "update_share_there": "‖ΔW′‖/‖W′‖",
    "update_change": "change of ΔW",
    "drift_along_update": "drift along ΔW",
    "update_in_drift": "ΔW in the drift",
    "inputs_moved": "inputs moved",
    "outputs_moved": "outputs moved",
    "inputs_cka": "CKA inputs",
    "outputs_cka": "CKA outputs",
}


def check_section(part: Part) -> str:
    """Verdict, coverage, weights and activations, and every layer with its reason."""
    layers: Sequence[Part] = part["layers"]
    shown = [name for name in _MEASURES if any(layer.get(name) is not None for layer in layers)]
    rows = []
    for layer in layers:
        where = (
            layer["source"] if layer["target"] in (layer["source"], None) else f"{layer['source']} → {layer['target']}"
        )
        way = layer["way"] + (", doubtful" if layer["doubtful"] else "")
        rows.append([where, way, *(_number(layer.get(name)) for name in shown), layer["why"]])
    similarity = part["weight_similarity"]
    lines = [
        f"<p><b>Verdict: {escape(part['verdict'])}.</b> {escape(_sentence(part['why']))}</p>",
        f"<p>Recommended method: {escape(part['recommended'] or 'none that is installed')}. {escape(part['coverage'])}.</p>",
        *(f'<p class="soft">{escape(note)}</p>' for note in part["notes"]),
        _figure(charts.shares(part["ways"]), "How the adapter's layers can be carried."),
        *(f"<p>{escape(line)}</p>" for line in _reasons(layers)),
    ]
    if similarity["all layers"] is not None:
        caption = (
            f"Cosine of the two models' weights, layer by layer: {similarity['all layers']:.3f} on average, "
            f"{similarity['lowest 20 %']:.3f} over the fifth with the lowest (dark)."
        )
        lines.append(_figure(charts.columns(_pairs(layers, "weight_cosine"), "weight cosine", lowest=True), caption))
        drift = charts.columns(_pairs(layers, "weight_drift"), "weight drift")
        lines.append(_figure(drift, "How far each layer's weight drifted: ‖W′ − W‖ / ‖W‖."))
    if any(layer.get("inputs_moved") is not None for layer in layers):
        caption = f"How far what each layer reads and returns moved, on {part['data']}. Relative, feature by feature."
        lines.append(_figure(charts.moved(layers), caption))
    heads = ["layer", "carried", *(_MEASURES[name] for name in shown), "why"]
    table = _table(heads, rows, text=(0, 1), long=len(heads) - 1)
    return f"<section><h2>Check</h2>{''.join(lines)}<h3>Layer by layer</h3>{table}</section>"


def _reasons(layers: Sequence[Part]) -> list[str]:
    """Why layers are carried as they are, those of one wording together."""
    told = []
    for group in grouped(layers, lambda one: (one["way"], one["doubtful"], wording_of(one["why"]))):
        way = group[0]["way"] + (", doubtful" if group[0]["doubtful"] else "")
        count = "1 layer" if len(group) == 1 else f"{len(group)} layers"
        told.append(f"{count} {way}: {merged([one['why'] for one in group])}.")
    return told


def transfer_section(part: Part) -> str:
    """What was written, by which method on which layer, with what loss."""
    layers: Mapping[str, Part] = part["layers"]
    numbers = list(
        dict.fromkeys(
            name for found in layers.values() for name, value in found.items() if name != "method" and _is_number(value)
        )
    )
    words = list(
        dict.fromkeys(
            name
            for found in layers.values()
            for name, value in found.items()
            if name != "method" and not _is_number(value)
        )
    )
    rows = [
        [
            path,
            found["method"],
            *(_number(found.get(name)) for name in numbers),
            *(str(found.get(name, "")) for name in words),
        ]
        for path, found in layers.items()
    ]
    made = ", ".join(f"{name} on {count} layers" for name, count in part["methods"].items())
    lines = [
        f"<p><b>{escape(part['target'])}</b>: {escape(part['read'])} → {escape(part['written'])} by {escape(made)}; "
        f"{part['parameters']:,} parameters, in {escape(part['out'])}.</p>"
    ]
    if part["trusted"]:
        lines.append("<p><b>By its fingerprint, the source was not the base that the adapter was trained on.</b></p>")
    errors = [(path, float(found["error"])) for path, found in layers.items() if _is_number(found.get("error"))]
    if errors:
        lines.append(
            _figure(charts.columns(errors, "relative error"), "What of each layer's update is lost on the way.")
        )
    if part["considered"]:
        measured = list(dict.fromkeys(name for found in part["considered"].values() for name in found))
        seen = [[name, *(_said(found.get(one)) for one in measured)] for name, found in part["considered"].items()]
        lines.append(f"<h3>What was considered</h3>{_table(['method', *measured], seen, text=(0,))}")
    if part["left_out"]:
        left = [[path, why] for path, why in part["left_out"].items()]
        lines.append(f"<h3>Left out</h3>{_table(['layer', 'why'], left, text=(0,), long=1)}")
    options = ", ".join(f"{name}={value}" for name, value in part["options"].items())
    if options:
        lines.append(f'<p class="soft">Options: {escape(options)}</p>')
    text = (0, 1, *range(2 + len(numbers), 2 + len(numbers) + len(words)))
    table = _table(["layer", "method", *numbers, *words], rows, text=text)
    return f"<section><h2>Transfer</h2>{''.join(lines)}<details><summary>Layer by layer</summary>{table}</details></section>"


def verify_section(part: Part) -> str:
    """The five models side by side."""
    rows, names = [], list(dict.fromkeys(name for row in part["rows"] for name in row["metrics"]))
    for row in part["rows"]:
        one = row["agreement"] or {}
        scores = [one.get("score"), one.get("direction"), one.get("strength"), row["retention"]]
        cells = [_number(value) for value in (*scores, *(row["metrics"].get(name) for name in names))]
        rows.append([row["name"], *cells, f"cannot be loaded: {row['error']}" if row["error"] else ""])
    warning = ' class="bad"' if part["loses_to"] or part["score"] is None else ""
    neutral = f" Neutral inputs: {part['neutral']}." if part["neutral"] else ""
    heads = ["model", "score", "direction", "strength", "retention", *names, ""]
    lines = [
        f"<p{warning}><b>{escape(_sentence(part['verdict']))}</b></p>",
        f"<p>Measured on {escape(part['data'])}, without labels.{escape(neutral)}</p>",
        *(f'<p class="soft">{escape(note)}</p>' for note in part["notes"]),
        _figure(
            charts.verified(part["rows"]),
            "Score: how much of what the adapter makes of its source it makes of the target. Direction: the cosine of the two changes "
            "of behaviour. Retention: what is left of the target's own behaviour on neutral inputs.",
        ),
        _table(heads, rows, text=(0, len(heads) - 1)),
        _pictures(part),
    ]
    return f"<section><h2>Verify</h2>{''.join(lines)}</section>"


def _pictures(part: Part) -> str:
    drawn = [row for row in part["rows"] if row["images"]]
    if not drawn:
        return ""
    heads = "".join(f"<th>{escape(row['name'])}</th>" for row in drawn)
    lines = []
    for number, prompt in enumerate(part["prompts"]):
        cells = "".join(
            f'<td><img alt="{escape(row["name"])}: {escape(prompt)}" src="{escape(row["images"][number])}"></td>'
            for row in drawn
        )
        lines.append(f'<tr><td class="text">{escape(prompt)}</td>{cells}</tr>')
    return f'<h3>What they draw</h3><div class="scroll"><table class="pictures"><tr><th></th>{heads}</tr>{"".join(lines)}</table></div>'


def _pairs(layers: Sequence[Part], name: str) -> list[tuple[str, float]]:
    return [(layer["source"], float(layer[name])) for layer in layers if layer.get(name) is not None]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3f}"


def _said(value: Any) -> str:
    return _number(value) if value is None or _is_number(value) else str(value)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = (), long: int | None = None
) -> str:
    """A table; `text` are columns of words, `long` one of sentences, and the others are numbers."""

    def cell(tag: str, column: int, value: str) -> str:
        css = ' class="text long"' if column == long else ' class="text"' if column in text else ""
        return f"<{tag}{css}>{escape(value)}</{tag}>"

    head = "".join(cell("th", column, value) for column, value in enumerate(heads))
    body = "".join(f"<tr>{''.join(cell('td', column, value) for column, value in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
