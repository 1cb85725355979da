"""What is asked, in which order, and what is not asked twice."""

import json
from functools import cache

import pytest
import torch

from qbench.evaluate import dialogue
from qbench.evaluate.dialogue import PLAIN_TEMPLATE, Answer, Question, answer, questions
from qbench.models.load import ModelRef

ASKED = [
    Question(1, "code", ("What is a list?", "And a dict?")),
    Question(2, "code", ("Sort a list.",)),
    Question(3, "text", ("Write a docstring.", "Make it shorter.")),
]


@cache
def nano():
    reference = ModelRef("zoo/nano-llama")
    return reference.load(), reference.tokenizer()


def plain(asked=ASKED, **kwargs):
    model, tokenizer = nano()
    return answer(model, tokenizer, asked, **{"max_new_tokens": 6, "template": PLAIN_TEMPLATE} | kwargs)


@pytest.fixture
def generated(monkeypatch):
    """The text and length of every prompt that the model is given."""
    prompts = []
    generate = dialogue._generate

    def listen(model, tokenizer, prompt, *args, **kwargs):
        prompts.append((tokenizer.decode(prompt), len(prompt)))
        return generate(model, tokenizer, prompt, *args, **kwargs)

    monkeypatch.setattr(dialogue, "_generate", listen)
    return prompts


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_real_questions_are_read_with_their_references(shared_data):
    mt_bench = shared_data / "mt_bench"
    asked = rows(mt_bench / "question.jsonl")
    with_references = questions(asked, rows(mt_bench / "reference_answer_gpt-4.jsonl"))
    assert [len(q.turns) for q in with_references] == [2] * 80
    # The other model answered reasoning, mathematics and coding; its answers replace the short notes there.
    told = {q.id for q in with_references if q.references != questions(asked)[q.id - 81].references}
    assert told == set(range(101, 131))
    assert {q.category for q in with_references if q.id in told} == {"reasoning", "math", "coding"}
    vicuna = questions(rows(shared_data / "vicuna_bench" / "question.jsonl"))
    assert [(len(q.turns), q.references) for q in vicuna] == [(1, ())] * 80


def test_both_schemas_give_the_same_questions():
    fastchat = {"question_id": 5, "category": "math", "turns": ["1+1?", "+1?"], "reference": ["2", "3"]}
    hub = {"prompt_id": 5, "category": "math", "prompt": ["1+1?", "+1?"], "reference": ["2", "3"]}
    assert questions([fastchat]) == questions([hub]) == [Question(5, "math", ("1+1?", "+1?"), ("2", "3"))]
    assert questions([hub | {"reference": []}])[0].references == ()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"category": "math", "turns": ["a"]}, "needs question_id or prompt_id"),
        ({"question_id": 1, "category": "math"}, "row 1 needs prompt .or turns., a list of texts"),
        ({"question_id": 1, "category": "math", "turns": "a"}, "row 1 needs turns .*found {'question_id'"),
        ({"question_id": 1, "category": "math", "turns": []}, "question 1 has an empty turn or none"),
        ({"question_id": 1, "turns": ["a"]}, "question 1 needs a category"),
        (
            {"question_id": 1, "category": "math", "turns": ["a"], "reference": ["b", "c"]},
            "question 1 has 1 turns and 2 reference answers",
        ),
    ],
)
def test_a_bad_row_is_refused_by_name(row, message):
    with pytest.raises(ValueError, match=message):
        questions([row])


def test_bad_references_and_repeated_ids_are_refused():
    row = {"question_id": 1, "category": "math", "turns": ["a"]}
    with pytest.raises(ValueError, match=r"reference 1 needs choices\[0\]\.turns"):
        questions([row], [{"question_id": 1, "choices": []}])
    with pytest.raises(ValueError, match=r"questions \[1\] come twice"):
        questions([row, row])


def test_the_second_turn_sees_the_first_answer(generated):
    [said] = plain(ASKED[:1])
    (first, _), (second, _) = generated
    assert first == "<|endoftext|>User: What is a list?\nAssistant:"
    assert second == f"{first} {said.turns[0]}\nUser: And a dict?\nAssistant:"
    assert said.question == ASKED[0]
    assert len(said.turns) == 2
    assert not said.truncated


def test_answers_are_the_most_likely_tokens():
    model, tokenizer = nano()
    ids = tokenizer("<|endoftext|>User: Sort a list.\nAssistant:")["input_ids"]
    prompt = len(ids)
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    text = tokenizer.decode(ids[prompt:], skip_special_tokens=True)
    assert "User:" not in text
    assert plain(ASKED[1:2])[0].turns == (text.strip(),)


def test_a_model_without_a_template_is_refused_unless_one_is_given(monkeypatch, generated):
    model, tokenizer = nano()
    with pytest.raises(ValueError, match=r"no chat template; .* pass template=PLAIN_TEMPLATE"):
        answer(model, tokenizer, ASKED, max_new_tokens=6)
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}<{{ m.content }}>{% endfor %}")
    answer(model, tokenizer, ASKED[1:2], max_new_tokens=6)
    assert generated[0][0] == "<Sort a list.>"


def test_a_tokenizer_without_a_first_token_renders_none():
    tokenizer = ModelRef("zoo/nano-llama").tokenizer()
    tokenizer.bos_token = None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], chat_template=PLAIN_TEMPLATE, tokenize=False
    )
    assert text == "User: a\n"


def test_a_prompt_that_does_not_fit_loses_its_beginning_and_is_flagged(generated):
    long = Question(9, "text", ("word " * 600 + "the end",))
    said = plain([long, ASKED[1]])
    assert [a.truncated for a in said] == [True, False]
    text, length = generated[0]
    assert length == 512 - 6
    assert text.endswith("the end\nAssistant:")
    with pytest.raises(ValueError, match=r"max_new_tokens is 512, .* context of 512 tokens"):
        plain(max_new_tokens=512)


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        (" A list.\nUser: And a dict?\nAssistant: no", "A list."),
        (" Super User: a role\n", "Super User: a role"),
        (" A list.<|endoftext|>And more", "A list."),
    ],
)
def test_an_answer_ends_where_the_model_ends_it_or_speaks_for_the_user(written, answer, monkeypatch):
    """The model is made to write a given text, after which it would write dots."""
    model, tokenizer = nano()
    script = [*tokenizer(written)["input_ids"], *tokenizer("." * 40)["input_ids"]]
    position, forward = [0], model.forward

    def scripted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(script[position[0]]), 3072)
        position[0] += 1
        return output

    monkeypatch.setattr(model, "forward", scripted)
    [said] = plain(ASKED[1:2], max_new_tokens=len(tokenizer(written)["input_ids"]))
    assert said.turns == (answer,)
    if answer == "A list.":
        assert position[0] < len(tokenizer(written)["input_ids"])


def test_progress_counts_every_question():
    seen = []
    plain(on_question=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_kept_answers_are_not_asked_again(tmp_path, generated):
    keep = tmp_path / "answers" / "nano.jsonl"
    first = plain(keep=keep)
    assert len(generated) == 5
    assert plain(keep=keep) == first
    assert len(generated) == 5
    assert all(isinstance(a, Answer) for a in first)


def test_a_killed_run_goes_on_where_it_was(tmp_path, generated):
    """At whatever byte the last line broke off, only its question is asked again."""
    keep = tmp_path / "answers.jsonl"
    whole = plain(keep=keep)
    content = keep.read_bytes()
    start = content[:-1].rfind(b"\n") + 1
    for end in (start + 1, (start + len(content)) // 2, len(content) - 1):
        keep.write_bytes(content[:end])
        generated.clear()
        assert plain(keep=keep) == whole
        assert [text.count("Write a docstring") for text, _ in generated] == [1, 1]
        assert keep.read_bytes() == content


def test_every_answer_is_on_disk_before_the_next_question(tmp_path):
    keep, lines = tmp_path / "answers.jsonl", []
    plain(keep=keep, on_question=lambda done, total: lines.append(len(rows(keep))))
    assert lines == [1, 2, 3]


def test_what_was_asked_otherwise_is_asked_again(tmp_path, generated):
    keep = tmp_path / "answers.jsonl"
    plain(keep=keep)
    generated.clear()
    plain(keep=keep, max_new_tokens=7)
    assert len(generated) == 5
    other = [Question(1, "code", ("What is a set?",)), *ASKED[1:]]
    generated.clear()
    assert plain(other, keep=keep)[0].question == other[0]
    assert len(generated) == 1
    generated.clear()
    plain(keep=keep, template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert len(generated) == 5


@pytest.mark.parametrize("content", [b"notes\n", b"notes without an end"])
def test_a_file_of_something_else_is_left_alone(content, tmp_path):
    keep = tmp_path / "notes.txt"
    keep.write_bytes(content)
    with pytest.raises(ValueError, match="no kept answer; name another file"):
        plain(keep=keep)
    assert keep.read_bytes() == content
