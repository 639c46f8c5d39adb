"""The record of a model for people: what it was made of, and how good it is. Called by `train`.

Sections as in Mitchell et al., Model Cards for Model Reporting (arXiv:1810.03993), as far as the
facts are known here; what a model is meant for, its maker has to add.
"""

from training.model import TrainedModel


def write(trained: TrainedModel) -> str:
    """The card as Markdown; the same for the same model."""
    facts = trained.configuration
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    rows = {
        "architecture": trained.architecture,
        "classes": f"{len(trained.classes)}",
        "source": facts.get("source", "unknown"),
        "starting weights": facts.get("weights"),
        "input": _input(trained),
        "parameters": f"{parameters:,}" if parameters else None,  # a frozen model has none
        "temperature": f"{trained.temperature:.3f}",
        "seed": facts.get("seed"),
        "made with": ", ".join(f"{name} {value}" for name, value in trained.versions.items()),
        "SHA-256 of the model": f"`{trained.fingerprint()}`",
    }
    lines = [
        f"# {trained.architecture}, {len(trained.classes)} classes",
        "",
        "| | |",
        "| --- | --- |",
    ]
    lines += [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    lines += ["", *_training(trained), *_test(trained)]
    return "\n".join(lines).rstrip() + "\n"


def _input(trained: TrainedModel) -> str:
    p = trained.preprocessing
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (p.mean, p.std))
    return (
        f"short side to {p.resize} pixels ({p.interpolation}), centre of {p.crop} x {p.crop}, "
        f"0..1, minus {mean}, divided by {std}"
    )


def _training(trained: TrainedModel) -> list[str]:
    if not trained.history:
        return []
    facts, recipe = trained.configuration, trained.configuration["recipe"]
    images = ", ".join(f"{count} {part}" for part, count in facts["images"].items())
    best = trained.metrics["best_epoch"]
    return [
        "## Training",
        "",
        f"Images: {images}; SHA-256 of their names and contents `{facts['data']}`.",
        f"{len(trained.history)} of at most {recipe['epochs']} epochs, the best of them "
        f"number {best}, by its accuracy on the validation images; {recipe['frozen_epochs']} "
        f"with only the last layer learning; "
        f"{'varied' if recipe['augment'] else 'unvaried'} images, at most "
        f"{recipe['batch_size']} a step.",
        "",
    ]


def _test(trained: TrainedModel) -> list[str]:
    metrics = trained.metrics
    if "test_accuracy" not in metrics:
        return ["Not measured here: no images with known classes were given.", ""]
    lines = [
        "## Measured on the test images",
        "",
        f"Accuracy {metrics['test_accuracy']:.1%} on {metrics['test_images']} images "
        f"(95 % interval of Wilson: {metrics['test_accuracy_low']:.1%} to "
        f"{metrics['test_accuracy_high']:.1%}); cross-entropy {metrics['test_loss']:.3f} nats.",
        f"Expected calibration error {metrics['calibration_error']:.3f}, without the temperature "
        f"{metrics['calibration_error_before']:.3f}. The temperature was fitted on the validation "
        "images, so that confidence says how often an answer is right.",
        "",
        "| class | images | precision | recall | 95 % interval | F1 |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in metrics["per_class"]:
        name = row["class"].replace("|", "\\|")
        lines.append(
            f"| {name} | {row['images']} | {row['precision']:.1%} | {row['recall']:.1%} "
            f"| {row['recall_low']:.1%} to {row['recall_high']:.1%} | {row['f1']:.2f} |"
        )
    return [*lines, ""]
