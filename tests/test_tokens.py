"""Subject positions, targets as continuations, and padding."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import LINES
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from nulledit.errors import FactError
from nulledit.models.batches import chunks_by_length, collate
from nulledit.models.tokens import RowEncoder, join_target


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
    with_first = copy.deepcopy(tokenizer)
    with_first.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", with_first.eos_token_id)]
    )
    row = RowEncoder(with_first, max_length=64).encode(
        "Ada lives in", subject=(0, 3), target="London"
    )
    plain = RowEncoder(tokenizer, max_length=64).encode(
        "Ada lives in", subject=(0, 3), target="London"
    )
    assert row.ids == (with_first.eos_token_id, *plain.ids)
    assert row.target_ids == plain.target_ids
    assert row.subject_last == plain.subject_last + 1


def test_an_end_token_after_the_text_is_left_out(tokenizer):
    with_last = copy.deepcopy(tokenizer)
    with_last.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", with_last.eos_token_id)]
    )
    row = RowEncoder(with_last, max_length=64).encode("Ada lives in", target="London")
    assert row == RowEncoder(tokenizer, max_length=64).encode("Ada lives in", target="London")


def trained(*, normalizer=None, prefix=False, trim=None, lines=()):
    """A byte-level tokenizer of another make than most tests have."""
    core = Tokenizer(models.BPE())
    if normalizer:
        core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    core.train_from_iterator([*LINES, *lines], trainer)
    if trim is not None:
        core.post_processor = processors.ByteLevel(trim_offsets=trim, add_prefix_space=prefix)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def whole_words(*, mark=None):
    """A tokenizer of the words of LINES; all others are one unknown piece."""
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if mark:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        )
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    core.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


COMPOSED = {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC}


@pytest.mark.parametrize("form", COMPOSED)
@pytest.mark.parametrize("template", ["{} lies in", "{}'s harbour", "{}", "The harbour of {}"])
@pytest.mark.parametrize(
    "subject", ["Malmo\u0308", "Velm\u1112\u1161\u11ab", "o\u0323\u0302", "Ada\u3099か\u3099"]
)
def test_a_composed_accent_is_its_letters(form, template, subject):
    """Composed or not, a subject has one row and one last token."""
    encoder = RowEncoder(trained(normalizer=COMPOSED[form]()), max_length=128)
    whole = COMPOSED[form]().normalize_str(subject)
    row = encoder.encode_template(template, subject, target="Ostrel")
    assert row == encoder.encode_template(template, whole, target="Ostrel")
    up_to = text_of(encoder, row.upto_subject().ids)
    assert up_to == template.split("{}")[0] + whole


def test_a_subject_or_target_that_the_tokenizer_drops_is_refused():
    encoder = RowEncoder(trained(normalizer=normalizers.Replace("Velm", "")), max_length=128)
    with pytest.raises(FactError, match="the subject is in no token"):
        encoder.encode_template("The harbour of {} lies", "Velm", target="east")
    with pytest.raises(FactError, match="the target 'Velm' of 'Ada lives in' has no tokens"):
        RowEncoder(
            trained(normalizer=normalizers.Replace(" Velm", "")), max_length=128
        ).encode_template("{} lives in", "Ada", target="Velm")


@pytest.mark.parametrize("trim", [None, False, True])
@pytest.mark.parametrize(
    ("subject", "prompt", "target"),
    [
        ("日本", "{}の首都は", "大阪"),
        ("タイ", "{}の首都は", "バンコク"),
        ("Ada", "{} lives in ", "London"),
    ],
)
def test_a_piece_across_the_border_is_taken_apart(trim, subject, prompt, target):
    """The prompt keeps its own ids, and the target, no beginning of a text, has no mark of one."""
    text = prompt.format(subject)
    joined = join_target(text, target)
    words = trained(prefix=True, trim=trim, lines=[f"{joined} {joined}"] * 9)
    assert len(words(joined)["input_ids"]) < len(words(text)["input_ids"]) + 1, "it crosses"
    row = RowEncoder(words, max_length=128).encode_template(prompt, subject, target=target)
    assert list(row.ids[: row.target_start]) == words(text)["input_ids"]
    assert words.decode(list(row.target_ids)) == joined[len(text) :]
    unmarked = copy.deepcopy(words)
    unmarked.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert list(row.target_ids) == unmarked(joined[len(text) :])["input_ids"]


SPACED = ("20 July 1969", "9,001 metres", "x", "London", "日本")


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("prompt", ["{} was born on", "{} was born on ", "{} was born on  ", "{}"])
@pytest.mark.parametrize("target", SPACED)
def test_trimmed_offsets_change_no_row(prefix, prompt, target):
    """A lone space in front of a target is the target's; one after a prompt is the prompt's."""
    trimmed, full = (
        RowEncoder(trained(prefix=prefix, trim=trim), max_length=64) for trim in (True, False)
    )
    row = trimmed.encode_template(prompt, "Ada", target=target)
    assert row == full.encode_template(prompt, "Ada", target=target)
    begun = trimmed.encode_template(prompt, "Ada")
    assert begun == full.encode_template(prompt, "Ada")
    assert row.ids[: row.target_start] == begun.ids
    assert trimmed.subject_tokens(prompt, "Ada") == full.subject_tokens(prompt, "Ada")


def test_words_that_drop_their_spaces_stay_whole():
    encoder = RowEncoder(whole_words(mark=True), max_length=64)
    for prompt in ("{} lives in", "{} lives in "):
        row = encoder.encode_template(prompt, "Ada", target="Paris.")
        assert encoder.tokenizer.convert_ids_to_tokens(list(row.target_ids)) == ["▁Paris."]


def test_what_the_tokenizer_has_no_pieces_for_is_refused():
    encoder = RowEncoder(whole_words(), max_length=64)
    assert encoder.encode_template("{} lives in", "Ada Quux", target="London").target_ids
    for target in ("大阪", "London Quux"):
        with pytest.raises(FactError, match=f"no pieces for the target '{target}'"):
            encoder.encode_template("{} lives in", "Ada", target=target)
    with pytest.raises(FactError, match="no pieces for the subject '大阪'"):
        encoder.encode_template("{} lives in", "大阪", target="London")
    assert encoder.encode("Quux lives in", target="Quux").target_ids, "probes are only scored"
    byte_level = trained()
    byte_level.add_special_tokens({"unk_token": "<|end|>"})  # as GPT-2's, which never gives it
    named = RowEncoder(byte_level, max_length=64).encode_template("{} is", "Ada", target="<|end|>")
    assert named.target_ids


def test_too_long_is_refused_with_both_lengths(tokenizer):
    with pytest.raises(
        FactError, match=r"prompt of \d+ tokens is longer than the model's context of 5"
    ):
        RowEncoder(tokenizer, max_length=5).encode("The river flows to the sea and the winters")
    with pytest.raises(FactError, match=r"tokens, the target's included, is longer"):
        RowEncoder(tokenizer, max_length=5).encode("The river", target="flows to the sea and on")


def test_what_is_no_unicode_is_named(tokenizer):
    """As bytes of a command line are that are not UTF-8."""
    with pytest.raises(FactError, match=r"lone surrogate U\+DCFF at character 3"):
        RowEncoder(tokenizer, max_length=64).encode("caf\udcff is")


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
