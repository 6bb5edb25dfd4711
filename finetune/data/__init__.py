"""Rows: read, formatted, split, tokenised.

In the order in which data flows:

- `sources.py`: what `dataset.path` names; `readers/`: raw rows of files.
- `conversion.py`: raw rows to the common form (`types.py`), by `layout.py` (which format, which
  column), `formats.py`, `messages.py` and `tool_calls.py`.
- `rows.py`: the rows of a run and their split; `duplicates.py`: rows that stay together;
  `mixture.py`: weights of sources; `split_files.py`: files named for a split.
- `chat_template.py`: chats rendered as text; `answers.py`: where their answers stand;
  `encoding.py`: token ids, and labels that say what is learnt; `tokens.py`: all rows, cached.
- `segments.py`: an example as text, for the preview and the report.
"""
