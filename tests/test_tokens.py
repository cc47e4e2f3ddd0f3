"""Subject positions, targets as continuations, and padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from nulledit.errors import FactError
from nulledit.models.tokens import RowEncoder, chunks_by_length, collate, join_target


@pytest.fixture
def encoder(tokenizer):
    return RowEncoder(tokenizer, max_length=128)


def text_of(encoder, ids):
    return encoder.tokenizer.decode(list(ids))


@pytest.mark.parametrize(
    ("template", "subject"),
    [
        ("{} was born in", "Émile Zola"),
        ("The harbour of {} lies on the", "Velm"),
        ("Karo Dun says that {} lives", "Karo Dun"),
        ("{} says that Karo Dun lives", "Karo Dun"),
        ("{}は", "東京タワー"),
        ("The {} is", "🦊"),
        ("{}", "x"),
        ('"{}!", he said', "Ada"),
    ],
)
def test_subject_last_holds_its_last_character(encoder, template, subject):
    row = encoder.encode_template(template, subject)
    before, _ = template.split("{}")
    up_to = text_of(encoder, row.ids[: row.subject_last + 1])
    short = text_of(encoder, row.ids[: row.subject_last])
    assert (before + subject) in up_to
    assert (before + subject) not in short


def test_context_moves_the_subject(encoder):
    row = encoder.encode_template("{} was born in", "Ada Byron", context="Then, he said. {}")
    assert text_of(encoder, row.ids[: row.subject_last + 1]) == "Then, he said. Ada Byron"


def test_target_is_a_continuation(encoder):
    row = encoder.encode("Ada lives in", target="London")
    assert text_of(encoder, row.target_ids) == " London"
    assert text_of(encoder, row.ids[: row.target_start]) == "Ada lives in"
    assert encoder.encode("Ada lives in ", target="London").target_ids


@pytest.mark.parametrize(
    ("prompt", "target", "joined"),
    [
        ("Ada lives in", "London", "Ada lives in London"),
        ("Ada lives in ", "London", "Ada lives in London"),
        ("東京は", "日本", "東京は日本"),
        ("Город стоит на реке", "Волга", "Город стоит на реке Волга"),
        ("The capital of Japan is", "東京", "The capital of Japan is 東京"),
    ],
)
def test_a_space_where_the_script_has_one(prompt, target, joined):
    assert join_target(prompt, target) == joined


def test_a_beginning_token_is_not_part_of_the_target(tokenizer):
    """Llama, Gemma and Phi put a token in front; a target tokenised alone would carry it too."""
    import copy

    with_first = copy.deepcopy(tokenizer)
    with_first.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", with_first.eos_token_id)]
    )
    row = RowEncoder(with_first, max_length=64).encode(
        "Ada lives in", subject_end=3, target="London"
    )
    plain = RowEncoder(tokenizer, max_length=64).encode(
        "Ada lives in", subject_end=3, target="London"
    )
    assert row.ids == (with_first.eos_token_id, *plain.ids)
    assert row.target_ids == plain.target_ids
    assert row.subject_last == plain.subject_last + 1


def test_an_end_token_behind_the_text_is_left_out(tokenizer):
    import copy

    with_last = copy.deepcopy(tokenizer)
    with_last.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", with_last.eos_token_id)]
    )
    row = RowEncoder(with_last, max_length=64).encode("Ada lives in", target="London")
    assert row == RowEncoder(tokenizer, max_length=64).encode("Ada lives in", target="London")


def test_too_long_is_refused_with_both_lengths(tokenizer):
    with pytest.raises(
        FactError, match=r"prompt of \d+ tokens is longer than the model's context of 5"
    ):
        RowEncoder(tokenizer, max_length=5).encode("The river flows to the sea and the winters")


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=6),
    st.booleans(),
)
def test_collate_keeps_every_token_and_its_position(rows, left):
    batch = collate(rows, pad_id=0, device=torch.device("cpu"), left=left)
    for i, row in enumerate(rows):
        kept = batch.mask[i].bool()
        assert batch.ids[i][kept].tolist() == row
        assert batch.positions[i][kept].tolist() == list(range(len(row)))
        assert bool(kept[-1 if left else 0])


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_chunks_hold_every_row_once_within_the_budget(lengths, budget):
    chunks = chunks_by_length(lengths, budget)
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * max(lengths[i] for i in chunk) <= budget
