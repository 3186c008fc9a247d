"""README.md of an exported model: a card that people, and the Hugging Face hub, can read."""

import math
from typing import Any

from pipeline.deploy.exported import ExportedModel, create_call
from pipeline.longtail import BOUNDS, class_groups
from pipeline.metrics import unmeasured
from pipeline.report.sections import SummaryRow, summary
from pipeline.report.study import SPLITS, Study
from pipeline.results.head_id import HeadId
from pipeline.results.mean_std import MeanStd
from pipeline.results.recommendation import recommendation
from pipeline.results.table import Column, Line, Table
from pipeline.text import markdown

READ = """image = ImageOps.exif_transpose(Image.open("photo.jpg"))
if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip
    image = image.convert("I").point(lambda value: value / 257 + 0.5)
image = image.convert("RGB")"""
COLUMNS = ("many", "medium", "few", "all", "ece")
GATED = "disalign"
BY_DIRECTION = {  # heads whose probabilities are not what was trained, though their decisions are
    "ala": "those of a feature of mean length",
    "ldam-drw": "those of a feature of mean length",
    "ncm": "without meaning",
}


def model_card(study: Study, exported: ExportedModel, config: dict[str, Any]) -> str:
    """Return the card: use of the model, its accuracy, choice of its head, training data, limits.

    Arguments:
        config: the content of config.json.
    """
    head, counts, names = exported.head, study.counts, [markdown(name) for name in config["class_names"]]
    groups = ", ".join(f"{int((m & study.tested).sum())} {g} ({BOUNDS[g]})" for g, m in class_groups(counts).items())
    over = f"{study.averaged}: {groups} training images"
    untested = "".join(f"\nNot measured: {note}." for note in unmeasured(study.tested, names, "test"))
    classes = ", ".join(names[:20]) + (f" … ({len(names)} in config.json)" if len(names) > 20 else "")
    origin = config["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
    licences = "the training images and of the pretrained weights" if config["pretrained"] else "the training images"
    return f"""{_front_matter(exported)}
# {markdown(study.folder.resolve().name)}: {exported.network}, {exported.classes} classes, rebalanced

An image classifier trained on unbalanced classes ({counts.sum():,} images, {counts.max():,} … {counts.min():,} a class),
its {"gated " if head["method"] == GATED else "linear "}head re-balanced with {HeadId.of_row(head)}.
{config["parameters"]:,} parameters, {config["num_features"]}-d features.

{_advice(study, head)}
## Use

{_use_onnx(exported, config) if exported.onnx else _use_timm(exported, config)}
Or without writing code, from files and folders: `pipeline predict {exported.out.resolve().name} IMAGES`.

## Accuracy

{_table(study, head).markdown()}

In %, on the test split, which selected nothing; a group's accuracy is the mean over its {over}.{untested}
± is one standard deviation over {study.repeated}.
{_choice(study, head)}

{_one_head(head)}

## Data

{exported.classes} classes: {classes}.
Training images per class are in config.json (`counts`); the data set's fingerprint is
`{origin["dataset"]}`.

## Limits

- It knows these classes only and always answers with one of them.
{_weakest(study, head, names)}\
- Rebalancing trades accuracy on large classes for small ones. Where the images to be classified are as unbalanced as
  the training set, the head before rebalancing may be the better one: `pipeline predict --compare` shows both.
- Probabilities are softmax outputs, {BY_DIRECTION.get(head["method"], "as well calibrated as ECE says")}.

## Licence

None is given here: it is yours to choose, within what the licences of {licences} allow.
Write it here and, for the Hugging Face hub, as a line `license: …` at the top.

## Made by

{versions}, on {origin["created"][:10]}; weights of the trained network `{origin["made_from"]["checkpoint"][:16]}`.
"""


def _advice(study: Study, head: dict[str, Any]) -> str:
    """Return the recommendation as a list, where this is the head that it is about."""
    if HeadId.of_row(head) != HeadId.of_row(study.document["selected"]):
        return ""
    return "".join(f"- {markdown(sentence)}\n" for sentence in recommendation(study.document))


def _front_matter(exported: ExportedModel) -> str:
    """Return the YAML that the Hugging Face hub reads; library_name is timm only where the hub's button can load it."""
    library = "onnx" if exported.onnx else None if exported.needs_package else "timm"
    loadable = library if exported.weights.suffix != ".pth" else None
    lines = [f"library_name: {loadable}"] * bool(loadable)
    lines += ["pipeline_tag: image-classification", "tags:", "- image-classification", "- long-tailed"]
    return "\n".join(["---", *lines, *[f"- {library}"] * bool(library), "---"])


def _pixels(config: dict[str, Any]) -> str:
    height, width = config["transform"]["size"]
    resize = f"Resize an RGB image's shorter side to {_shorter(config)} pixels ({config['transform']['interpolation']})"
    return f"{resize} and take the middle {height} × {width}"


def _shorter(config: dict[str, Any]) -> int:
    return math.floor(min(config["transform"]["size"]) / config["transform"]["crop_pct"])


def _use_onnx(exported: ExportedModel, config: dict[str, Any]) -> str:
    (height, width), mean, std = config["transform"]["size"], config["transform"]["mean"], config["transform"]["std"]
    assert exported.onnx is not None
    check, runtime = exported.onnx["checked"], exported.onnx["versions"]["onnxruntime"]
    return f"""```python
{_onnx_code(exported.out.resolve().name, config)}```

- Input `images`: uint8, batch × 3 × {height} × {width}, any batch: RGB, channels first, 0 … 255. {_pixels(config)}.
  Do not normalise: mean {mean} and standard deviation {std} (of 0 … 1) are taken out inside the graph.
- Outputs, float32: `logits`, batch × {exported.classes}; `features`, batch × {config["num_features"]}, what the head sees.
- Opset {exported.onnx["opset"]}. Class names, resizing and head are in the file's own metadata too, as JSON.
- When it was made, onnxruntime {runtime} gave PyTorch's results on {check["images"]} random images,
  at most {check["largest_difference"]:.0e} apart (the largest logit is {check["largest_logit"]:.1f}).
"""


def _use_timm(exported: ExportedModel, config: dict[str, Any]) -> str:
    folder, mean, std = exported.out.resolve().name, config["transform"]["mean"], config["transform"]["std"]
    hub = ", from the hub `hf-hub:NAME/OF-IT`" if exported.weights.suffix == ".safetensors" else ""
    call = f"`timm.create_model('local-dir:{folder}', pretrained=True)`{hub}"
    from_folder = (
        "" if exported.needs_package else f"\nOr the folder as it stands, with timm 1.0.16 or newer: {call}.\n"
    )
    return f"""```python
{_timm_code(exported, folder)}```

{_pixels(config)}, scale to 0…1, take out mean {mean} and standard deviation {std}: `transform` does.
{from_folder}"""


def _timm_code(exported: ExportedModel, folder: str) -> str:
    imports, _, call = create_call(
        exported.network, exported.model_args, exported.classes, f"{folder}/{exported.weights.name}"
    ).rpartition("; ")
    return f"""import json
from pathlib import Path
{imports.replace("; ", chr(10))}
import torch
from PIL import Image, ImageOps

config = json.loads(Path("{folder}/config.json").read_text("utf-8"))
{call}.eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(config["pretrained_cfg"]))
{READ}
with torch.no_grad():
    probabilities = model(transform(image)[None]).softmax(1)[0]
best = int(probabilities.argmax())
print(config["class_names"][best], float(probabilities[best]))
"""


def _onnx_code(folder: str, config: dict[str, Any]) -> str:
    (height, width), filtered = config["transform"]["size"], config["transform"]["interpolation"].upper()
    return f"""import json
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{folder}/model.onnx")
names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])

{READ}
size = [{_shorter(config)} * side // min(image.size) for side in image.size]
image = image.resize(size, Image.Resampling.{filtered})
left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)
pixels = np.asarray(image.crop((left, top, left + {width}, top + {height})))

logits = session.run(["logits"], {{"images": pixels.transpose(2, 0, 1)[None]}})[0][0]
probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
best = int(probabilities.argmax())
print(names[best], float(probabilities[best]))
"""


def _table(study: Study, head: dict[str, Any]) -> Table:
    """Return the report's rows, and the exported head's own where they are means of several."""
    lines = [Line([row.name, *(row.cells[c] for c in COLUMNS)]) for row in main_table(study, head)]
    exported = HeadId.from_dict(head)
    rows = [r for r in study.first.rows if r["split"] == "test" and exported.matches(r) and r["seed"] == exported.seed]
    if rows and (head["of_seeds"] > 1 or head["backbone"]):
        lines.append(Line(["**the head in this folder**", *(MeanStd(rows[0][c]) for c in COLUMNS)]))
    return Table([Column("head"), *(Column("ECE" if c == "ece" else c) for c in COLUMNS)], lines)


def main_table(study: Study, head: dict[str, Any]) -> list[SummaryRow]:
    """Return the report's main table, with the exported head where it is not the selected one."""
    head_id = HeadId.of_row(head)
    return summary(study, extra=None if head_id == study.first.selected else head_id)


def _choice(study: Study, head: dict[str, Any]) -> str:
    """Return a sentence on how the head was chosen."""
    if head["lam"] is None:
        selected = HeadId.of_row(head) == study.first.selected and head["chosen_on"]
        return (
            f"The head was chosen on {SPLITS[head['chosen_on']]}." if selected else "The method was given, not chosen."
        )
    return f"λ was chosen on {SPLITS[head['chosen_on']]}." if head["chosen_on"] else "λ was given, not chosen."


def _weakest(study: Study, head: dict[str, Any], names: list[str]) -> str:
    """Return a line on the five classes that are recognised worst."""
    accuracies = study.first.class_accuracy(HeadId.of_row(head), "test")
    if accuracies is None:
        return ""
    weakest = sorted((float(accuracy), c) for c, accuracy in enumerate(accuracies) if accuracy == accuracy)[:5]
    texts = [f"{names[c]} {accuracy:.0f} % ({study.counts[c]} training images)" for accuracy, c in weakest]
    return f"- Weakest classes on test: {', '.join(texts)}.\n"


def _one_head(head: dict[str, Any]) -> str:
    """Return a sentence on which of the heads behind a row of means the folder holds."""
    if head["of_seeds"] == 1 and not head["backbone"]:
        return "This folder holds the only head of its row."
    parts = [f"batch order {head['seed']} of {head['of_seeds']}"] * (head["of_seeds"] > 1)
    parts += [f"backbone {head['backbone']}"] if head["backbone"] else []
    return f"The last row is the one head that this folder holds: {', '.join(parts)}; rows with ± are means."
