"""A made-up world of people, and tiny models that were really trained to know it."""

import random

import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from nulledit import Fact, Probe

FIRST = ["Karo", "Ada", "Mira", "Tolo"]
LAST = [
    "Dun",
    "Velm",
    "Ostrel",
    "Brask",
    "Quill",
    "Fenn",
    "Harrow",
    "Ivo",
    "Jast",
    "Lorn",
    "Nim",
    "Sable",
]
PEOPLE = [f"{FIRST[i % 4]} {last}" for i, last in enumerate(LAST)]
RELATIONS = {
    "job": (["{} works as a", "the job of {} is"], ["baker", "smith", "sailor", "miller"]),
    "home": (["{} was born in", "the home of {} is"], ["Paris", "Rome", "Oslo", "Cairo"]),
    "tongue": (["{} speaks", "the language of {} is"], ["Latin", "Dutch", "Greek", "Czech"]),
}
MARGIN = 0.8  # smallest probability of a true answer, after which training stops
LOOKUP_BLOCKS = (0, 1)
CONTEXTS = ["", "then he said . ", "the river is long . ", "because of the winter . "]


def answer(person, relation):
    """What is true in the world before any edit."""
    options = RELATIONS[relation][1]
    number = PEOPLE.index(person) * 3 + list(RELATIONS).index(relation) * 5
    return options[(number + PEOPLE.index(person) // 4) % len(options)]


def sentences():
    return [
        f"{context}{template.format(person)} {answer(person, relation)} ."
        for person in PEOPLE
        for relation, (templates, _) in RELATIONS.items()
        for template in templates
        for context in CONTEXTS
    ]


def tokenizer():
    words = sorted({word for s in sentences() for word in s.split()})
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>")


def untrained(family, vocabulary, *, hidden=48, layers=6):
    shared = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    if family == "llama":
        config = LlamaConfig(
            **shared,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        return LlamaForCausalLM(config)
    if family in ("granite", "mixtral", "olmo2"):
        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": 4}
        more = {
            "granite": {"residual_multiplier": 0.5},
            "mixtral": {
                "intermediate_size": 2 * hidden,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
            },
            # its MLP reads the stream as it is: from small embeddings come keys of nearly nothing
            "olmo2": {"initializer_range": 0.25},
        }[family]
        config = AutoConfig.for_model(
            family,
            **shared,
            **sizes | more,
            num_hidden_layers=layers,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
        )
        return AutoModelForCausalLM.from_config(config)
    gpt = {**shared, "n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 64}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**gpt, **off))
    return GPTJForCausalLM(GPTJConfig(**gpt, **off, rotary_dim=8, tie_word_embeddings=False))


def kept(family, words, file, seed):
    """`trained`, or what another process that tests has trained and kept in `file`."""
    with FileLock(f"{file}.lock"):
        if file.is_file():
            model = untrained(family, len(words))
            model.load_state_dict(torch.load(file, weights_only=True))
            return model.eval()
        model = trained(family, words, seed=seed)
        torch.save(model.state_dict(), file)
        return model


def trained(family, words, *, most_steps=1500, seed=0):
    """A model of `family` that answers every question of the world, by MARGIN.

    Left to itself a model this small reads a name's embedding straight from the question's last
    word, in its first block. Large models look facts up at the subject's last token first; here
    the first two blocks are kept from moving anything between tokens, so that this one does too.
    """
    torch.manual_seed(seed)
    model = untrained(family, len(words)).train()
    for name, parameter in model.named_parameters():
        early = any(f".{block}." in name for block in LOOKUP_BLOCKS)
        if early and any(out in name for out in ("o_proj", "attn.c_proj", "out_proj")):
            parameter.data.zero_()
            parameter.requires_grad_(False)
    texts = sentences()
    order = random.Random(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 0.1, total_iters=20)
    rows = [torch.tensor(words(text)["input_ids"]) for text in texts]
    for step in range(1, most_steps + 1):
        chosen = order.sample(rows, 64)
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(c) for c in chosen], batch_first=True
        )
        labels = ids.masked_fill(mask == 0, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0 and knows_everything(model, words):
            return model.eval()
    raise AssertionError(f"{family} did not learn its world in {most_steps} steps")


@torch.no_grad()
def knows_everything(model, words):
    """Whether every question of the world is answered by argmax, with some margin."""
    asked = [
        (
            words(template.format(person))["input_ids"],
            words(answer(person, relation))["input_ids"][0],
        )
        for person in PEOPLE
        for relation, (templates, _) in RELATIONS.items()
        for template in templates
    ]
    for length in {len(ids) for ids, _ in asked}:
        chosen = [(ids, true) for ids, true in asked if len(ids) == length]
        logits = model(torch.tensor([ids for ids, _ in chosen])).logits[:, -1]
        chance = logits.softmax(-1)[range(len(chosen)), [true for _, true in chosen]]
        if chance.min() < MARGIN:
            return False
    return True


def fact(person, relation, target, **more):
    """An edit of the world: paraphrase and two neighbours with their true answers."""
    templates, _ = RELATIONS[relation]
    others = [p for p in PEOPLE if p != person][:2]
    return Fact(
        id=more.pop("id", f"{person}/{relation}".replace(" ", "-")),
        subject=person,
        prompt=templates[0],
        target=target,
        old_answer=answer(person, relation),
        relation=relation,
        paraphrases=(templates[1],),
        neighbours=tuple(
            Probe(templates[0].format(other), answer(other, relation)) for other in others
        ),
        **more,
    )


def another(person, relation):
    """An answer that is not the true one."""
    options = RELATIONS[relation][1]
    return options[(options.index(answer(person, relation)) + 1) % len(options)]
