"""The data of a run, as a model card describes them: names and a hash, no rows and no paths."""

from finetune.config.data_folder import is_remote
from finetune.config.schema import RunConfig
from finetune.config.sections.dataset import DatasetSettings
from finetune.sharing.public_values import file_name, is_hub_id

PYTHON_DOCS = "python_docs"


def hub_datasets(settings: DatasetSettings) -> list[str]:
    """Return the hub ids among a run's data, for the field `datasets` of a card."""
    paths = [source.path for source in settings.sources]
    return list(dict.fromkeys(path for path in paths if is_hub_id(path)))


def data_lines(config: RunConfig) -> list[str]:
    """Describe each source of a run's rows, and the files of held-out and test rows."""
    settings = config.dataset
    lines = []
    for source in settings.sources:
        weight = f", weight {source.weight:g}" if source.weight != 1 else ""
        lines.append(_describe(source.path, settings) + weight)
    for purpose, path in (
        ("held-out rows", settings.eval_path),
        ("test rows", settings.test_path),
    ):
        if path is not None:
            lines.append(f"{purpose}: {_describe(path, settings)}")
    return lines


def _describe(path: str, settings: DatasetSettings) -> str:
    if path == PYTHON_DOCS:
        return (
            "questions about Python, made from the docstrings of its standard library"
        )
    if is_remote(path):
        return f"a file in object storage: `{file_name(path)}`"
    if not is_hub_id(path):
        return f"a local file or folder: `{file_name(path)}`"
    words = [f"[{path}](https://huggingface.co/datasets/{path})"]
    if settings.name is not None:
        words.append(f"configuration `{settings.name}`")
    if settings.revision is not None:
        words.append(f"revision `{settings.revision}`")
    words.append(f"split `{settings.split}`")
    return ", ".join(words)
