"""``README.md`` of a checkpoint or bundle: what its manifest says, for people and for a hub; free to edit."""

from __future__ import annotations

import json
from pathlib import Path

from .manifest import CARD, KIND_NAMES, Manifest

_RUN = {
    "bundle": """```sh
pip install flrc-edge
flrc-edge chat FOLDER
flrc-edge serve FOLDER      # OpenAI's API on http://127.0.0.1:8080/v1
```

```python
import flrc_runtime

model = flrc_runtime.load("FOLDER")
for token in model.stream("Why is the sky blue?"):
    print(token.text, end="", flush=True)
```

Stage 0 alone also runs in onnxruntime-genai.
""",
    "static": """```sh
pip install flrc-edge
flrc-edge generate FOLDER "Once upon a time"
```

Every stage has two graphs of standard operators and fixed shapes, one for a token and one for a piece of a prompt.
""",
    "portable": """```python
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

model = ORTModelForCausalLM.from_pretrained("FOLDER", file_name="stage_0.onnx")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
```

Every stage is a graph of its own with the same inputs and outputs, and all read one weight file.
""",
    "checkpoint": """```sh
pip install 'flrc-edge[all]'
flrc-edge export FOLDER -o BUNDLE      # ONNX graphs for a device
```

```python
import flrc_edge

model = flrc_edge.load("FOLDER", stage=0)      # a Hugging Face model
```
""",
}


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write the card into a folder that is about to be sealed."""
    (folder / CARD).write_text(model_card(manifest), "utf-8")


def model_card(manifest: Manifest) -> str:
    """Return the card: YAML metadata and Markdown, nothing that the manifest does not say."""
    model, plan = manifest.model, manifest.plan
    tags = ["flrc-edge", "low-rank", "svd", *(["onnx"] if manifest.stages else [])]
    lines = [
        "---",
        "library_name: flrc-edge",
        "pipeline_tag: text-generation",
        f"tags: {json.dumps(tags)}",
        f"model_name: {json.dumps(f'{model.name}, {KIND_NAMES[manifest.kind]} of flrc-edge')}",
        "---",
        "",
        f"# {_plain(model.name)}, low-rank",
        "",
        f"A {KIND_NAMES[manifest.kind]} of {_plain(model.name)} ({model.architecture}, {model.parameters / 1e6:,.1f} M "
        f"parameters), compressed with flrc-edge: {_projections(manifest)}. Numbers: "
        f"{manifest.dtype}{f', embedding and head {plan.embedding}' if plan.embedding else ''}.",
        "",
        *_stages(manifest),
        *_calibration(manifest),
        "## Use it",
        "",
        _RUN[manifest.kind],
        "## Licence",
        "",
        "That of the original model, whose weights these are in another form. What the original cannot do, and must "
        "not be used for, holds here too; a smaller keep forgets more.",
        "",
    ]
    return "\n".join(lines)


def _projections(manifest: Manifest) -> str:
    projections = manifest.plan.projections
    dense = sum(p.dense for p in projections)
    if dense == len(projections):
        return f"all {dense} projections keep their full matrix"
    stored = sorted({p.storage for p in projections if not p.dense})
    return (
        f"{len(projections) - dense} of {len(projections)} projections are {' and '.join(stored)} low-rank factors "
        f"({manifest.factorization}), with ranks chosen by `{manifest.plan.allocator}`"
    )


def _stages(manifest: Manifest) -> list[str]:
    plan, schedule = manifest.plan, manifest.schedule
    context = manifest.model.context_length
    header = "| stage | keep | projection parameters | from answer token |"
    if manifest.stages:
        header += " bytes a token |"
    if schedule.divergence:
        header += " KL to dense |"
    lines = [header, "|---" * (header.count("|") - 1) + "|"]
    for i in range(plan.num_stages):
        first = schedule.first_token(i, context)
        row = f"| {i} | {plan.kept(i):.3f} | {plan.activated(i) / 1e6:,.1f} M | {'never' if first is None else first} |"
        if manifest.stages:
            row += f" {manifest.stages[i].bytes / 1e6:,.1f} MB |"
        if schedule.divergence:
            values = schedule.divergence[i]
            row += f" {sum(values) / len(values):.3f} |"
        lines.append(row)
    lines += ["", "*keep* is the share of the projections' parameters that a stage reads."]
    if schedule.divergence:
        lines[-1] += " KL in nats a token, on the dense model's own answers."
    return [*lines, ""]


def _calibration(manifest: Manifest) -> list[str]:
    found = manifest.calibration
    if found is None:
        return []
    texts = ", ".join(f"{_plain(t.name)} ({t.tokens} tokens)" for t in found.texts)
    return [
        f"Calibrated on {found.tokens} tokens in windows of {found.window}: {texts}; seed {found.seed}.",
        "",
    ]


def _plain(name: str) -> str:
    """Return a name without what Markdown would take for markup."""
    return "".join(c if c.isalnum() or c in " ._-" else " " for c in name)
