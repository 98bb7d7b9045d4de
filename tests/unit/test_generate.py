"""`sparsekv generate`: the tokens are those of the cache used by hand, and what is printed is what is held."""

import io
import re
import sys
from pydoc_data.topics import topics

import pytest
import torch
from tiny import make_sharp, make_tiny_tokenizer, messages, save_tiny
from transformers import DynamicCache, GenerationConfig

from sparsekv.adapters import attach_lora, merge_adapter
from sparsekv.anchors import AnchorConfig
from sparsekv.cli import main
from sparsekv.demo import SHIPPED
from sparsekv.inference import session as session_module
from sparsekv.inference.anchor_cache import AnchorCache
from sparsekv.inference.config import GenerateConfig
from sparsekv.inference.generate import encode, generate
from sparsekv.inference.press_cache import PressCache
from sparsekv.inference.reading import read
from sparsekv.inference.session import Held, Session
from sparsekv.inference.static_cache import StaticAnchorCache
from sparsekv.models import load_model, load_tokenizer
from sparsekv.presses import make_press
from sparsekv.prompts import encode_prompt

TEXT = topics["if"][:900]
ANCHORS = AnchorConfig(sink_size=2, recent_size=8)
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose next token depends on what it sees, and a prompt file beside it."""
    folder = tmp_path_factory.mktemp("model")
    model = make_sharp("llama")
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    (folder / "long.txt").write_text(TEXT, "utf-8")
    return folder


def config(folder, **changes) -> GenerateConfig:
    values = {"model": str(folder), "prompt_file": str(folder / "long.txt"), "anchors": ANCHORS, "device": "cpu"}
    return GenerateConfig(**{**values, "max_new_tokens": NEW, **changes})


def by_hand(folder, cache_of, **prompt) -> list[int]:
    """Greedy tokens after the context, which the cache reads first."""
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    context, (rest,) = encode_prompt(tokenizer, TEXT, [prompt.get("question", "")], "")
    cache = cache_of(model, tokenizer, context)
    if not cache.get_seq_length():
        with torch.no_grad():
            model(input_ids=context, past_key_values=cache)
    ids = torch.cat([context, rest], dim=1)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 2}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    return out[0, ids.shape[1] :].tolist()


CACHES = {
    "full": ({}, lambda model, tokenizer, context: DynamicCache()),
    "anchors": ({}, lambda model, tokenizer, context: AnchorCache(model, tokenizer, ANCHORS)),
    "budget": ({"keep": "anchors", "budget": 30}, lambda m, t, context: AnchorCache(m, t, ANCHORS, budget=30)),
    "streaming": (
        {"keep": "anchors", "budget": 30, "mode": "streaming"},
        lambda m, t, context: AnchorCache(m, t, ANCHORS, budget=30, mode="streaming"),
    ),
    "knorm": ({"ratio": 0.6}, lambda m, t, context: PressCache.prefill(m, context, make_press("knorm", 0.6))),
    "observed_attention": ({"ratio": 0.6}, None),
}


@pytest.mark.parametrize("name", [name for name, (_, make) in CACHES.items() if make])
def test_the_answer_is_that_of_the_cache_by_hand(folder, name):
    changes, make = CACHES[name]
    session = Session(config(folder, **{"keep": name, **changes}))
    context, rest = encode(session, TEXT, "What?")
    session.read(context)
    before = context.shape[1] + rest.shape[1]
    session.answer(rest)
    wanted = by_hand(folder, make, question="\n\nWhat?")
    found = session.ids[0, before:].tolist()
    assert found == [token for token in wanted if token != 2]
    if name != "full":
        assert wanted != by_hand(folder, CACHES["full"][1], question="\n\nWhat?"), "eviction must be seen"


@pytest.mark.parametrize("mode", ["prefill", "streaming"])
@pytest.mark.parametrize("pads", [None, [0, 5]])
def test_reading_in_chunks_is_reading_at_once(mode, pads):
    model, tokenizer = make_sharp("llama"), make_tiny_tokenizer()
    ids = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = None if pads is None else (torch.arange(40) >= torch.tensor(pads)[:, None]).long()
    held = []
    for chunk in (None, 1, 7, 40):
        context = {"context_length": 40} if mode == "prefill" else {}
        cache = AnchorCache(model, tokenizer, ANCHORS, mode=mode, budget=20, **context)
        read(model, cache, ids, mask, chunk)
        read(model, cache, ids, mask, chunk)  # nothing is left to read
        assert cache.get_seq_length() == 40
        held.append((cache.layers[1].keys, cache.layers[1].values))
    for keys, values in held[1:]:
        torch.testing.assert_close(keys, held[0][0], atol=1e-4, rtol=0)
        torch.testing.assert_close(values, held[0][1], atol=1e-4, rtol=0)


def test_fixed_shapes_give_the_same_answer(folder, monkeypatch):
    found = []
    for device, kind in (("cuda", AnchorCache), ("cpu", StaticAnchorCache)):
        monkeypatch.setattr(session_module, "FAST_ON", device)
        session = Session(config(folder, budget=30))
        context, rest = encode(session, TEXT, "What?")
        session.fix_shapes(rest.shape[1] + NEW)
        session.read(context)
        held = Held.by(session.cache)
        session.answer(rest)
        assert type(session.cache) is kind
        found.append(session.ids.tolist())
        assert (held.tokens, held.kept) == (context.shape[1], 30)
    assert found[0] == found[1]


def test_an_adapter_answers_as_its_merged_model(folder, tmp_path, capsys):
    adapted = attach_lora(load_model(str(folder)), 4, 8, ["q_proj", "v_proj"])
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapter(str(folder), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    said = []
    for changes in ({"adapter": str(tmp_path / "adapter")}, {"model": str(tmp_path / "merged")}, {}):
        generate(config(folder, **changes))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_the_command_says_what_is_to_come(folder, monkeypatch):
    rooms = []
    monkeypatch.setattr(Session, "fix_shapes", lambda self, room: rooms.append((self, room)))
    generate(config(folder, question="What?"))
    ((session, room),) = rooms
    assert room == encode(session, TEXT, "What?")[1].shape[1] + NEW


@pytest.mark.parametrize("changes", [{"keep": "full"}, {"mode": "streaming"}, {"keep": "knorm", "ratio": 0.5}])
def test_caches_that_have_no_fixed_shapes(folder, monkeypatch, changes):
    monkeypatch.setattr(session_module, "FAST_ON", "cpu")
    session = Session(config(folder, **changes))
    before = session.cache
    session.fix_shapes(50)
    assert session.cache is before


def test_attention_without_fixed_shapes(folder, monkeypatch):
    monkeypatch.setattr(session_module, "FAST_ON", "cpu")
    session = Session(config(folder))
    session.model.set_attn_implementation("eager")
    session.fix_shapes(50)
    assert type(session.cache) is AnchorCache


# ---- as a command ----


def run(*arguments: str, status: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == status


def flags(folder, *more: str) -> list[str]:
    values = ["--model", str(folder), "--prompt-file", str(folder / "long.txt"), "--max_new_tokens", str(NEW)]
    return ["generate", *values, "--device", "cpu", "--anchors.sink_size", "2", "--anchors.recent_size", "8", *more]


FIGURES = r"context: ([\d,]+) of ([\d,]+) tokens kept \(([\d.]+)%\), ([\d.]+) MiB → ([\d.]+) MiB of keys and values"


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        (["--keep", "full"], lambda tokens: tokens),
        (["--keep", "anchors", "--budget", "30"], lambda tokens: 30),
        (["--keep", "anchors", "--budget", "30", "--mode", "streaming"], lambda tokens: 30),
        (["--keep", "knorm", "--ratio", "0.5"], lambda tokens: tokens - int(tokens * 0.5)),
        (["--keep", "observed_attention", "--ratio", "0.5"], lambda tokens: tokens - int(tokens * 0.5)),
    ],
)
def test_what_is_printed(folder, capsys, more, kept):
    run(*flags(folder, *more, "--question", "What?"))
    printed = capsys.readouterr()
    assert printed.out.strip()
    context, answer = messages(printed.err)
    found, tokens, share, before, after = (float(x.replace(",", "")) for x in re.fullmatch(FIGURES, context).groups())
    assert found == pytest.approx(kept(tokens), abs=1)
    assert share == pytest.approx(100 * found / tokens, abs=0.1)
    assert after == pytest.approx(before * found / tokens, abs=0.1)
    assert re.fullmatch(r"answer: \d+ tokens, [\d.]+ tokens/s, the first after [\d.]+ s", answer)


def test_bytes_are_those_of_the_tensors():
    model, tokenizer = make_sharp("llama"), make_tiny_tokenizer()
    cache = AnchorCache(model, tokenizer, ANCHORS, budget=20)
    read(model, cache, torch.randint(5, 300, (1, 100), generator=torch.Generator().manual_seed(0)))
    entry = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, channels, bytes
    assert Held.by(cache) == Held(100, 20, 100 * entry, 20 * entry)


def test_without_a_template_a_text_is_continued_where_it_ends(folder, capsys):
    run(*flags(folder, "--keep", "full", "--chat_template", "false"))
    printed = capsys.readouterr().out
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    ids = tokenizer.encode(tokenizer.bos_token + TEXT, return_tensors="pt", add_special_tokens=False)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 2}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert printed.rstrip("\n") == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).rstrip("\n")


def test_text_from_the_standard_input(folder, capsys, monkeypatch):
    run(*flags(folder))
    wanted = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    run(*flags(folder, "--prompt_file", "-"))
    assert capsys.readouterr().out == wanted


def test_draws_follow_the_seed(folder, capsys):
    said = []
    for seed in ("1", "1", "2"):
        run(*flags(folder, "--temperature", "1.5", "--seed", seed))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_the_models_own_defaults_do_not_change_greedy_answers(folder, tmp_path, capsys):
    run(*flags(folder))
    wanted = capsys.readouterr().out
    GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=5.0).save_pretrained(tmp_path)
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "long.txt").write_text(TEXT, "utf-8")
    run(*flags(tmp_path))
    assert capsys.readouterr().out == wanted


# ---- bad input ----


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--keep", "anchor_s", "--ratio", "0.5"], "--keep names 'anchor_s'; did you mean anchor"),
        (["--keep", "knorm"], "--keep knorm: give --ratio too"),
        (["--keep", "knorm:0.5"], "--keep knorm:0.5: give --ratio too"),
        (["--keep", "knorm", "--ratio", "1"], "--ratio 1.0: must be in [0, 1)"),
        (["--keep", "knorm", "--ratio", "0.5", "--budget", "90"], "--budget 90: for --keep anchors"),
        (["--keep", "full", "--mode", "streaming"], "--mode streaming: for --keep anchors"),
        (["--keep", "full", "--ratio", "0.5"], "--ratio 0.5: for a press"),
        (["--keep", "no_press", "--ratio", "0"], "--keep no_press: for the full cache say --keep full"),
        (["--keep", "finch", "--ratio", "0.5"], "--keep finch: it reads the question too"),
        (["--keep", "decoding_knorm", "--ratio", "0.5"], "--keep decoding_knorm: it evicts while"),
        (["--keep", "cam_knorm", "--ratio", "0.5"], "--keep cam_knorm: it evicts while the answer is written"),
        (["--keep", "chunkkv:chunk_length=0", "--ratio", "0.5"], "chunk_length must be 1 or more, not 0"),
        (["--budget", "9"], "--budget 9: must be 10 tokens or more, sink_size 2 + recent_size 8"),
        (["--mode", "ring"], "--mode ring: must be prefill or streaming"),
        (["--budget", "1.5"], "--budget 1.5: must be a whole number"),
        (["--keep", "knorm", "--ratio", "half"], "--ratio half: must be a number"),
        (["--keep", "snapkv:window_size=2000", "--ratio", "0.5"], "--keep snapkv:window_size=2000: fails on a context"),
        (["--seed", "-1"], "--seed -1: must be at least 0 and below 2**32"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0: must be 1 or more"),
        (["--max_new_tokens", "2000"], "--max_new_tokens 2000 are more than the model's 2048 positions"),
        (["--temperature", "-1"], "--temperature -1.0: must be 0 or more"),
        (["--top_p", "0"], "--top_p 0.0"),
        (["--prompt_file", "nowhere.txt"], "--prompt_file nowhere.txt: it cannot be read (No such file"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--adapter", "nowhere"], "--adapter nowhere"),
        (["--dtype", "int8"], "--dtype int8"),
    ],
)
def test_one_line_and_status_2(folder, capsys, more, said):
    run(*flags(folder, *more), status=2)
    printed = capsys.readouterr()
    (line,) = messages(printed.err)
    assert said in line
    assert not printed.out


def test_a_tokenizer_of_a_larger_model(folder, tmp_path, capsys):
    small = save_tiny(tmp_path / "small", vocab_size=50)
    run(*flags(folder, "--model", small), status=2)
    printed = capsys.readouterr()
    (line,) = messages(printed.err)
    assert f"--model {small}: its tokenizer makes token " in line
    assert not printed.out


@pytest.mark.parametrize("more", [[], ["--temperature", "1"], ["--keep", "full"]])
@pytest.mark.parametrize("by_adapter", [False, True])
def test_a_model_that_has_diverged(folder, tmp_path, capsys, more, by_adapter):
    model = load_model(str(folder))
    if by_adapter:
        model = attach_lora(model, 4, 8, ["v_proj"])
    for name, weight in model.named_parameters():
        if "v_proj" in name:
            torch.nn.init.constant_(weight, 1e30 if by_adapter else float("nan"))  # no number, once it is multiplied
    model.save_pretrained(tmp_path / "bad")
    load_tokenizer(str(folder)).save_pretrained(tmp_path / "bad")
    flag = "--adapter" if by_adapter else "--model"
    run(*flags(folder, flag, str(tmp_path / "bad"), *more), status=2)
    printed = capsys.readouterr()
    (line,) = messages(printed.err)
    assert line == f"sparsekv: {flag} {tmp_path}/bad: its output is not a number; give one that has not diverged"


@pytest.mark.parametrize(("content", "said"), [(b"", "holds no text"), (b" \n", "holds no text"), (b"\xc6", "0xc6")])
def test_files_that_hold_no_text(folder, capsys, tmp_path, content, said):
    (tmp_path / "bad.txt").write_bytes(content)
    run(*flags(folder, "--prompt_file", str(tmp_path / "bad.txt")), status=2)
    (line,) = messages(capsys.readouterr().err)
    assert line.startswith(f"sparsekv: --prompt_file {tmp_path / 'bad.txt'}: ")
    assert said in line


@pytest.mark.parametrize("name", ["--model", "--prompt_file"])
def test_what_is_required(folder, capsys, name):
    arguments = flags(folder)
    at = arguments.index(name.replace("prompt_", "prompt-"))
    run(*arguments[:at], *arguments[at + 2 :], status=2)
    (line,) = messages(capsys.readouterr().err)
    assert f"{name} is missing" in line


def test_a_model_with_sliding_layers(tmp_path, capsys):
    make_sharp("gemma3").save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "long.txt").write_text(TEXT, "utf-8")
    run(*flags(tmp_path), status=2)
    (line,) = messages(capsys.readouterr().err)
    assert "gemma3_text: has sliding_attention layers" in line
    run(*flags(tmp_path, "--keep", "full"))


# ---- a needle, on the real model ----

NEEDLE = "The secret code of the harbour is 7391."
QUESTION = "What is the secret code of the harbour? Answer with the number only."


def needle_context(tokens: int, place: float, tokenizer) -> str:
    """A text of about so many tokens with the needle at a share of its length."""
    ids = tokenizer("\n".join(topics.values())).input_ids[: tokens - 60]
    before, after = (tokenizer.decode(part) for part in (ids[: int(place * len(ids))], ids[int(place * len(ids)) :]))
    return f"{before}\n\n{NEEDLE} That is all there is to say about it.\n\n{after}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "changes", "most", "found"),
    [
        (1.0, {}, 0.3, True),
        (1.0, {"budget": 128}, 0.07, True),
        (1.0, {"budget": 128, "adapter": str(SHIPPED)}, 0.07, True),
        (0.6, {"anchors": AnchorConfig(recent_size=1000)}, 0.7, True),
        (0.6, {}, 0.3, False),  # evicted
        (0.6, {"keep": "full"}, 1, True),
    ],
)
def test_a_needle_is_found_where_it_is_kept(tmp_path, capsys, place, changes, most, found):
    text = needle_context(2000, place, load_tokenizer("smollm2-135m"))
    (tmp_path / "long.txt").write_text(text, "utf-8")
    file = str(tmp_path / "long.txt")
    options = {"dtype": "float32", "device": "cpu", "max_new_tokens": 16, **changes}
    generate(GenerateConfig("smollm2-135m", prompt_file=file, question=QUESTION, **options))
    printed = capsys.readouterr()
    assert ("7391" in printed.out) == found
    kept, tokens, _, before, after = (float(x.replace(",", "")) for x in re.match(FIGURES, printed.err).groups())
    assert tokens == pytest.approx(2000, abs=100)
    assert after / before == pytest.approx(kept / tokens, rel=0.05)
    assert kept <= most * tokens


def test_nothing_to_read():
    """As in a chat whose first turn is one token: it is left for the answer."""
    model = make_sharp("llama")
    cache = DynamicCache(config=model.config)
    read(model, cache, torch.zeros(1, 0, dtype=torch.long))
    assert cache.get_seq_length() == 0
