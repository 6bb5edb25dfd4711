"""Rows that can't be learnt are refused in one line: key, file, row, what is wrong, what is allowed."""

from typing import Any

import pytest
from support.bad_input import matches
from support.conversion import convert
from support.models import Row
from support.rows import A, Q, asked, chat

from finetune.errors import ConfigError

ASKED = {"role": "user", "content": Q}
ANSWERED = {"role": "assistant", "content": A}
ROW = "dataset.path=rows.jsonl: row 1"
GOOD = {"prompt": Q, "completion": A}
FORMATS = "formats: chat: messages or conversations; prompt_completion: prompt and completion, …question and answer…; alpaca: instruction and output…; text: text; dataset.columns, dataset.template and dataset.text_field name others"


def messages(**fields: Any) -> Row:
    """A chat whose answer has further fields."""
    return {"messages": [ASKED, {**ANSWERED, **fields}]}


def parts(*content: Any) -> Row:
    return messages(content=list(content))


def call(**fields: Any) -> Row:
    return messages(tool_calls=[{"name": "f", **fields}])


MESSAGES: list[tuple[str, Row, str]] = [
    ("image", parts({"type": "image"}), f"{ROW}, message 2, part 1 is of type image; allowed: text (images, audio…"),
    ("image_url", parts({"type": "text", "text": A}, {"type": "image_url", "image_url": {"url": "x"}}), f"{ROW}, message 2, part 2 is of type image_url; allowed: text…"),
    ("input_audio", parts({"type": "input_audio", "input_audio": {}}), f"{ROW}, message 2, part 1 is of type input_audio; allowed: text…"),
    ("video", parts({"type": "video"}), f"{ROW}, message 2, part 1 is of type video; allowed: text…"),
    ("tool_use_part", parts({"type": "tool_use", "name": "f"}), f"{ROW}, message 2, part 1 is of type tool_use; allowed: text…"),
    ("part_without_type", parts({"value": A}), f"{ROW}, message 2, part 1 is of type None; allowed: text…"),
    ("part_that_is_text", parts(A), f"{ROW}, message 2, part 1 must be an object with type and text, but is str"),
    ("text_part_of_a_number", parts({"type": "text", "text": 4}), f"{ROW}, message 2, part 1: text is no text but int"),
    ("part_with_more", parts({"type": "text", "text": A, "citations": ["x"]}), f"{ROW}, message 2, part 1 has citations; allowed: type, text"),
    ("content_object", messages(content={"a": 1}), f"{ROW}, message 2: a message must have 'role' and 'content'…content must be text, null or a list of parts, but is dict"),
    ("content_number", messages(content=4), f"{ROW}, message 2: …content must be text, null or a list of parts, but is int"),
    ("no_content", {"messages": [{"role": "user"}, ANSWERED]}, f"{ROW}, message 1: a message must have 'role' and 'content'…"),
    ("no_role", {"messages": [{"content": Q}, ANSWERED]}, f"{ROW}, message 1: a message must have 'role' and 'content'…"),
    ("null_role", {"messages": [{"role": None, "content": Q}, ANSWERED]}, f"{ROW}, message 1: a message must have 'role' and 'content'…"),
    ("role_number", {"messages": [{"role": 1, "content": Q}]}, f"{ROW}, message 1: a message must have 'role' and 'content'…as text"),
    ("message_text", {"messages": ["hello"]}, f"{ROW}, message 1: a message must have 'role' and 'content'…"),
    ("message_null", {"messages": [ASKED, None]}, f"{ROW}, message 2: a message must have 'role' and 'content'…"),
    ("unknown_role", {"messages": [{"role": "critic", "content": Q}, ANSWERED]}, f"{ROW}, message 1: role=critic: allowed: system, developer, user, assistant, tool, or another word for one (human, …gpt, …"),
    ("unknown_from", {"conversations": [{"from": "narrator", "value": Q}]}, f"{ROW}, message 1: role=narrator: allowed: system, developer, user, assistant, tool, …"),
    ("two_roles", {"messages": [{**ASKED, "from": "gpt"}]}, f"{ROW}, message 1 has role=user and from=gpt, which differ"),
    ("two_contents", {"messages": [{**ASKED, "value": "other"}]}, f"{ROW}, message 1 has content and value, which differ"),
    ("two_reasonings", messages(reasoning="a", reasoning_content="b"), f"{ROW}, message 2 has reasoning_content and reasoning…, which differ"),
    ("reasoning_list", messages(reasoning_content=["a"]), f"{ROW}, message 2: reasoning_content is no text but list"),
    ("weight_half", messages(weight=0.5), f"{ROW}, message 2: weight=0.5: must be 0 or 1"),
    ("weight_text", messages(weight="0"), f"{ROW}, message 2: weight=0: must be 0 or 1"),
    ("train_text", messages(train="no"), f"{ROW}, message 2: train=no: must be true or false"),
    ("train_number", messages(train=0), f"{ROW}, message 2: train=0: must be true or false"),
    ("train_of_a_user", {"messages": [{**ASKED, "train": True}, ANSWERED]}, f"{ROW}, message 1: train=true with role=user: only the assistant's messages are learnt; dataset.ignore=[train]…"),
    ("two_systems", {"messages": [{"role": "system", "content": "a"}, ASKED, ANSWERED], "system": "b"}, f"{ROW}: column 'system' and the chat's first message are two different system turns"),
    ("messages_text", {"messages": "hello"}, f"{ROW}: column 'messages' must be JSON, but is 'hello' (…)"),
    ("messages_number", {"messages": 4}, f"{ROW} has no list of messages in column 'messages'"),
    ("uneven_lists", {"messages": {"role": ["user"], "content": [Q, A]}}, f"{ROW}, message 1: a message must have…; the messages must be a list"),
]  # fmt: skip

TOOLS: list[tuple[str, Row, str]] = [
    ("arguments_text", call(arguments="of legs"), f"{ROW}, message 2, tool call 1: arguments must be JSON, but is 'of legs' (…)"),
    ("arguments_list", call(arguments=[1]), f"{ROW}, message 2, tool call 1: arguments must be an object, or one as JSON text, but are list"),
    ("arguments_json_list", call(arguments="[1]"), f"{ROW}, message 2, tool call 1: arguments must be an object, or one as JSON text, but are list"),
    ("arguments_python", call(arguments="{'a': 1}"), f"{ROW}, message 2, tool call 1: arguments must be JSON, but is…"),
    ("arguments_half_pair", call(arguments='{"a": "\\ud83d"}'), f"{ROW}, message 2, tool call 1: arguments: its JSON text has half a surrogate pair, which is no text"),
    ("arguments_key_twice", call(arguments='{"a": 1, "a": 2}'), f"{ROW}, message 2, tool call 1: arguments: its JSON text has the key 'a' twice in one object"),
    ("arguments_long_number", call(arguments='{"a": %s}' % ("9" * 5000)), f"{ROW}, message 2, tool call 1: arguments: its JSON text has a number of more than 4300 digits"),
    ("arguments_deep", call(arguments='{"a": %s}' % ("[" * 150 + "]" * 150)), f"{ROW}, message 2, tool call 1: arguments: its JSON text is nested more than 100 levels deep"),
    ("arguments_very_deep", call(arguments="[" * 99999 + "]" * 99999), f"{ROW}, message 2, tool call 1: arguments: its JSON text is nested more than 100 levels deep"),
    ("tool_half_pair", {**chat(Q, A), "tools": ['{"name": "\\ud83d"}']}, f"{ROW}: column 'tools': tool 1: its JSON text has half a surrogate pair, which is no text"),
    ("no_name", messages(tool_calls=[{"function": {"arguments": {}}}]), f"{ROW}, message 2, tool call 1 has no name; its keys: arguments"),
    ("call_number", messages(tool_calls=[4]), f"{ROW}, message 2, tool call 1 must be an object with a name and arguments"),
    ("calls_number", messages(tool_calls=4), f"{ROW}, message 2: tool_calls must be a list, or one as JSON text, but is int"),
    ("calls_text", messages(tool_calls="f()"), f"{ROW}, message 2: tool_calls must be JSON, but is 'f()' (…)"),
    ("custom_call", messages(tool_calls=[{"type": "custom", "custom": {}}]), f"{ROW}, message 2, tool call 1 is of type custom; allowed: function"),
    ("call_with_more", call(result="4"), f"{ROW}, message 2, tool call 1 has result; allowed: type, id, function (name, arguments)"),
    ("call_of_a_user", {"messages": [{**ASKED, "tool_calls": [{"name": "f"}]}, ANSWERED]}, f"{ROW}, message 1 of role user has tool_calls, which only an assistant's message may have"),
    ("sharegpt_call", {"conversations": [{"from": "human", "value": Q}, {"from": "function_call", "value": "find(0)"}]}, f"{ROW}, message 2: tool_calls must be JSON, but is 'find(0)' (…)"),
    ("tools_text", {**chat(Q, A), "tools": "none"}, f"{ROW}: column 'tools' must be JSON, but is 'none' (…)"),
    ("tools_number", {**chat(Q, A), "tools": 4}, f"{ROW}: column 'tools' must be a list, or one as JSON text, but is int"),
    ("tool_without_name", {**chat(Q, A), "tools": [{"description": "x"}]}, f"{ROW}: column 'tools': tool 1 has no name; its keys: description"),
    ("tool_of_a_type", {**chat(Q, A), "tools": [{"type": "code_interpreter"}]}, f"{ROW}: column 'tools': tool 1 is of type code_interpreter; allowed: function"),
    ("tool_text", {**chat(Q, A), "tools": ["find"]}, f"{ROW}: column 'tools': tool 1 must be JSON, but is 'find' (…)"),
    ("tool_function_text", {**chat(Q, A), "tools": [{"function": "find"}]}, f"{ROW}: column 'tools': tool 1: function must be an object with a name and parameters"),
]  # fmt: skip

SHAPES: list[tuple[str, Row, str]] = [
    ("no_format", {"body": "b", "title": "t"}, f"{ROW} has the columns of no format; its fields: body, title; {FORMATS}"),
    ("premise", {"premise": "p", "hypothesis": "h", "label": 1}, f"{ROW} has the columns of no format; its fields: premise, hypothesis, label; {FORMATS}"),
    ("preference", {"prompt": Q, "chosen": A, "rejected": "5"}, f"{ROW}: preference rows (chosen, rejected) are not learnt; dataset.columns={{prompt: …, completion: chosen}} learns the chosen answers; its fields: prompt, chosen, rejected"),
    ("preference_chats", {"chosen": chat(Q, A)["messages"], "rejected": []}, f"{ROW}: preference rows (chosen, rejected) are not learnt; dataset.columns={{messages: chosen}} learns the chosen answers; …"),
    ("preference_beside_chat", {"conversations": [{"from": "human", "value": Q}], "chosen": {"from": "gpt", "value": A}, "rejected": {}}, f"{ROW} has the column 'rejected': this is a preference row (chosen, rejected); dataset.ignore=[rejected] learns…"),
    ("kto", {**GOOD, "label": False}, f"{ROW} has the column 'label': it marks the answer as good or bad (KTO); dataset.ignore=[label] learns the row without it"),
    ("kto_csv", {**GOOD, "label": "True"}, f"{ROW} has the column 'label': it marks the answer as good or bad (KTO); …"),
    ("kto_chat", {**chat(Q, A), "kto_tag": False}, f"{ROW} has the column 'kto_tag': it marks the answer as good or bad (KTO); …"),
    ("scored", {**GOOD, "score": 0.2}, f"{ROW} has the column 'score': it is a score of the answer; dataset.ignore=[score] learns the row without it"),
    ("rated", {"instruction": Q, "output": A, "rating": "4"}, f"{ROW} has the column 'rating': it is a score of the answer; …"),
    ("scored_answers", {"prompt": Q, "responses": [A, "5"], "scores": [1, 0]}, f"{ROW}: scored answers (scores) are not learnt; a row holds one answer to learn; its fields: …"),
    ("stepwise", {"prompt": Q, "completions": [A], "labels": [True]}, f"{ROW}: scored answers (labels) are not learnt; …"),
    ("prompt_only", {"prompt": Q}, f"{ROW}: prompts without answers (unlabeled rows) can't be learnt; its fields: prompt"),
    ("question_only", {"question": Q, "prompt": Q}, f"{ROW}: prompts without answers (unlabeled rows) can't be learnt; its fields: question, prompt"),
    ("tokens", {"input_ids": [1, 2], "labels": [1, 2]}, f"{ROW}: rows that are tokenised already (input_ids) are not read; the text is needed; its fields: …"),
    ("images", {**chat(Q, A), "images": ["a.png"]}, f"{ROW} has the column 'images': only text can be learnt; dataset.ignore=[images]…"),
    ("audio", {"text": "Just text.", "audio": {"path": "a.wav"}}, f"{ROW} has the column 'audio': only text can be learnt; …"),
    ("fraction", {"text": Q, "label": 0.37}, f"{ROW}: field 'label' is no text and no whole number but float; dataset.format=text learns the text alone"),
    ("classes", {"text": Q, "label": [1, 2]}, f"{ROW}: field 'label' is no text and no whole number but list; dataset.format=text learns the text alone"),
    ("prompt_number", {"prompt": 4, "completion": A}, f"{ROW}: field 'prompt' is no text but int"),
    ("system_list", {**GOOD, "system": ["a"]}, f"{ROW}: field 'system' is no text but list"),
    ("history_text", {**GOOD, "history": "Hello."}, f"{ROW}: column 'history' must be JSON, but is 'Hello.' (…)"),
    ("history_object", {**GOOD, "history": {"a": 1}}, f"{ROW}: column 'history' must be a list of [question, answer], or of messages, but is dict"),
    ("history_of_texts", {**GOOD, "history": ["Hello.", "Hello, Bo."]}, f"{ROW}: column 'history': item 1 must be two texts, [question, answer]"),
    ("history_of_three", {**GOOD, "history": [["a", "b"], ["a", "b", "c"]]}, f"{ROW}: column 'history': item 2 must be two texts, [question, answer]"),
    ("history_unanswered", {**GOOD, "history": [["a", None]]}, f"{ROW}: column 'history': item 1 must be two texts, [question, answer]"),
]  # fmt: skip

CASES = MESSAGES + TOOLS + SHAPES


def refusal_of(*rows: Row, **changes: Any) -> str:
    """The line that refuses rows."""
    with pytest.raises(ConfigError) as refused:
        convert(*rows, **changes)
    line = str(refused.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("row", "says"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_row_is_refused_in_one_line(row: Row, says: str) -> None:
    line = refusal_of(row)
    assert matches(says, line), line


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (chat(Q, A), GOOD, "row 2 has no list 'messages' or 'conversations'; its fields: prompt, completion; format chat needs messages or conversations"),
        (GOOD, chat(Q, A), "row 2 has no field 'prompt'; its fields: messages; format prompt_completion needs prompt and completion, or …"),
        ({"question": Q, "answer": A}, GOOD, "row 2 has no field 'question'; its fields: prompt, completion; format prompt_completion needs …question and answer…"),
        ({"text": "x"}, {"tekst": "x"}, "row 2 has no field 'text'; its fields: tekst; format text needs text"),
        ({"instruction": Q, "output": A}, {"instruction": Q}, "row 2 has no field 'output'; its fields: instruction; format alpaca needs instruction and output, or …"),
        ({**GOOD, "messages": None}, {"prompt": None, "completion": None, **chat(Q, A)}, "row 2 has the columns of format chat, the first row of prompt_completion; all rows of a path must have one format"),
        ({"text": "x", "instruction": None, "output": None}, {"text": None, "instruction": Q, "output": A}, "row 2 has the columns of format alpaca, the first row of text; …"),
        (GOOD, {**GOOD, "label": False}, "row 2 has the column 'label': it marks the answer…"),
    ],
    ids=["chat", "pair", "synonym", "text", "alpaca", "null_pair", "null_text", "late_mark"],
)  # fmt: skip
def test_a_row_that_does_not_fit_the_format_of_the_first_is_refused_by_its_number(
    first: Row, second: Row, says: str
) -> None:
    line = refusal_of(first, second)
    assert matches(f"dataset.path=rows.jsonl: {says}", line), line


CONFIG: list[tuple[str, dict[str, Any], Row, str]] = [
    ("no_column", {"columns": {"prompt": "frage", "completion": "b"}}, {"a": Q, "b": A}, f"dataset.columns.prompt=frage: {ROW} has no such column; its fields: a, b"),
    ("no_messages", {"columns": {"messages": "dialog"}}, {"chat": []}, f"dataset.columns.messages=dialog: {ROW} has no such column; its fields: chat"),
    ("no_system", {"columns": {"system": "persona"}}, GOOD, "dataset.columns.system=persona: no row of dataset.path=rows.jsonl has such a column; the first row's fields: prompt, completion"),
    ("no_partner", {"columns": {"prompt": "frage"}}, {"frage": Q, "antwort": A}, f"dataset.columns={{prompt: frage}}: {ROW}: the completion must be named too; its fields: frage, antwort"),
    ("system_of_text", {"columns": {"system": "s"}}, {"text": "x", "s": "y"}, f"dataset.columns.system=s: {ROW}: format text has no system; its purposes: text"),
    ("history_of_chat", {"columns": {"history": "h"}}, {**chat(Q, A), "h": []}, f"dataset.columns.history=h: {ROW}: format chat has no history; its purposes: messages, system, tools"),
    ("prompt_of_chat", {"format": "chat", "columns": {"prompt": "p"}}, {**chat(Q, A), "p": Q}, f"dataset.columns.prompt=p: {ROW}: format chat has no prompt; …"),
    ("named_format", {"format": "prompt_completion"}, {"prompt": Q}, f"{ROW} has no field 'completion'; its fields: prompt; format prompt_completion needs prompt and completion, or …"),
    ("named_alpaca", {"format": "alpaca"}, {"question": Q, "answer": A}, f"{ROW} has no field 'instruction'; its fields: question, answer; format alpaca needs instruction and output, or …"),
    ("template_undefined", {"template": "{{titel}}"}, {"title": "T", "answer": A}, f"dataset.template={{{{titel}}}}: {ROW}: 'titel' is undefined; its fields: title, answer"),
    ("template_syntax", {"template": "{{title"}, {"title": "T", "answer": A}, "dataset.template={{title: must be a Jinja template (…)"),
    ("template_error", {"template": "{{ n / 0 }}"}, {"n": 1, "answer": A}, f"dataset.template={{{{ n / 0 }}}}: {ROW}: division by zero; its fields: n, answer"),
    ("template_unsafe", {"template": "{{ t.__class__.__mro__ }}"}, {"t": "T", "answer": A}, f"dataset.template=…: {ROW}: access to attribute '__class__' of 'str' object is unsafe.; …"),
    ("template_of_chat", {"format": "chat", "template": "x"}, chat(Q, A), f"dataset.template=x: {ROW}: format chat has no prompt; …"),
    ("template_without_answer", {"template": "{{t}}"}, {"t": "T"}, f"dataset.columns={{prompt: dataset.template}}: {ROW}: the completion must be named too; its fields: t…"),
    ("ignored_nothing", {"ignore": ["reasonning"]}, chat(Q, A), "dataset.ignore=[reasonning]: no row has such a field; did you mean reasoning …? allowed: …"),
    ("ignored_needed", {"ignore": ["completion"]}, GOOD, f"{ROW}: prompts without answers (unlabeled rows) can't be learnt; its fields: prompt"),
    ("unknown_purpose", {"columns": {"question": "q"}}, GOOD, "dataset.columns.question=q: no such purpose; did you mean …? allowed: completion, history, messages, prompt, system, tools"),
    ("column_number", {"columns": {"prompt": 4}}, GOOD, "dataset.columns.prompt=4: must be the name of a column"),
    ("column_twice", {"columns": {"prompt": "a", "completion": "a"}}, GOOD, "dataset.columns.prompt=a: each column can serve one purpose only"),
    ("messages_and_prompt", {"columns": {"messages": "m", "prompt": "p"}}, GOOD, "dataset.columns.messages=m: not with prompt, completion or dataset.template"),
    ("messages_and_template", {"columns": {"messages": "m"}, "template": "x"}, GOOD, "dataset.columns.messages=m: not with prompt, completion or dataset.template"),
    ("prompt_and_template", {"columns": {"prompt": "p"}, "template": "x"}, GOOD, "dataset.template=x: makes the prompt; not with dataset.columns.prompt"),
    ("blank_template", {"template": " "}, GOOD, "dataset.template= : must be text, or null"),
    ("ignored_role", {"ignore": ["role"]}, chat(Q, A), "dataset.ignore=['role']: a message's role can't be left out"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "row", "says"),
    [case[1:] for case in CONFIG],
    ids=[case[0] for case in CONFIG],
)
def test_a_key_that_does_not_fit_the_rows_is_refused_in_one_line(
    changes: dict[str, Any], row: Row, says: str
) -> None:
    line = refusal_of(row, **changes)
    assert matches(says, line), line


def test_a_number_that_is_no_class_is_refused_with_the_classes() -> None:
    from support.conversion import open_converter

    _, converter = open_converter()
    with pytest.raises(
        ConfigError, match=r"row 7: field 'label' is -1.*classes: bad, good"
    ):
        converter.convert(
            {"text": Q, "label": -1}, "rows.jsonl", 7, {"label": ["bad", "good"]}
        )


def test_columns_that_the_config_names_win_over_the_shape_of_preferences() -> None:
    row = {"prompt": Q, "chosen": A, "rejected": "5"}
    assert convert(row, columns={"prompt": "prompt", "completion": "chosen"}) == asked(
        Q, A
    )
