"""The report's confusion table: the labels of the test rows against the most likely ones."""

from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.metrics.classification import Classification, shorten
from sweeps.answer.report_data import ReportData
from sweeps.answer.report_section import Row, Section


def confusion_section(data: ReportData) -> Section:
    """Show how often the winner takes each label for which; empty without classification."""
    title = "Confusion"
    if data.answer is None:
        return Section("confusion", title)
    folder = RunFolder(data.study.folder / "best")
    recorded = (read_json(folder.test_rows) or {}).get("classification")
    if recorded is None:
        return Section("confusion", title)
    classification = Classification.from_dict(recorded)
    rows = []
    for label, counts in zip(
        classification.labels, classification.confusion(), strict=True
    ):
        rows.append(Row([label, *map(str, counts)]))
    return Section(
        "confusion",
        title,
        "The winner on the test rows: each line has the rows of one label, each column those of "
        "which this label is the most likely answer.",
        head=["label", *map(shorten, classification.labels)],
        rows=rows,
    )
