"""Text one token at a time is the text of all tokens at once, whatever a character is split into."""

from __future__ import annotations

import random

import pytest
import transformers
from pagedcore.errors import InvalidArgumentError, UnsupportedError
from pagedcore.tokenizer import PROMPT_CONTEXT, Detokenizer, Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

TEXT = "Grüße aus Köln, 東京 und 서울! 👩‍👩‍👧 naïve café — “ok”\n\n  two  spaces\tand a tab. ∑ 𝛼 𓀀"


def byte_level():
    """GPT-2's kind: every byte is a token, no merges, so each character beyond ASCII is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))


def sentencepiece_like():
    """Llama 2's kind: words begin with a mark that the decoder turns into a space, dropped at the very start; bytes
    for the rest.
    """
    words = ["▁Hello", "▁wor", "ld", "!", "▁", "a", "▁a", "é", "▁the", "s"]
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    vocabulary |= {word: 257 + i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")), vocabulary


def stream(tokenizer, ids, prompt=()):
    return stream_with(tokenizer.detokenizer(), ids, prompt)


def stream_with(detokenizer, ids, prompt=()):
    state, pieces = detokenizer.begin(prompt), []
    for token in ids:
        piece, state = detokenizer.after(state, token)
        pieces.append(piece)
    return [*pieces, detokenizer.after(state, None, last=True)[0]]


def test_split_characters_wait_until_they_are_whole():
    tokenizer = byte_level()
    ids = tokenizer.encode(TEXT)
    assert len(ids) == len(TEXT.encode())
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[:4] == ["G", "r", "", "ü"], "text comes as soon as it is certain"


def test_an_incomplete_end_is_flushed():
    tokenizer = byte_level()
    ids = tokenizer.encode("a€")[:-1]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == "a\ufffd"
    assert pieces[-1] == "\ufffd"


def test_bytes_that_are_no_text_do_not_hold_up_what_follows():
    tokenizer = byte_level()
    invalid = tokenizer.encode("ÿ")[1]  # a byte that only continues a character
    ids = [invalid] * 40 + tokenizer.encode("fine")
    pieces = stream(tokenizer, ids)
    assert "".join(pieces).endswith("fine")
    assert any(pieces[:20]), "not held back for ever"


def test_the_space_before_the_first_word():
    tokenizer, vocabulary = sentencepiece_like()
    ids = [vocabulary[word] for word in ("▁wor", "ld", "!", "▁the", "▁a")]
    assert "".join(stream(tokenizer, ids)) == "world! the a" == tokenizer.decode(ids)
    prompt = [vocabulary["▁Hello"]]
    assert "".join(stream(tokenizer, ids, prompt)) == " world! the a", "after a prompt the space belongs to the answer"


def test_byte_fallback():
    tokenizer, vocabulary = sentencepiece_like()
    ids = [vocabulary["▁Hello"], *(vocabulary[f"<0x{byte:02X}>"] for byte in "€😀".encode()), vocabulary["▁the"]]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == "Hello€😀 the" == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def bytes_of(text, vocabulary):
    return [vocabulary[f"<0x{byte:02X}>"] for byte in text.encode()]


@pytest.mark.parametrize("repeated", ["😀", "東京", "é", "a€😀ü", "xy東😀"], ids=ascii)
@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 5])
def test_long_runs_of_bytes(repeated, first):
    """The window slides between characters: a decoder that is given half of one gives up the whole run."""
    tokenizer, vocabulary = sentencepiece_like()
    text = repeated * 30
    ids = [vocabulary["▁Hello"]] * first + bytes_of(text, vocabulary)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == (" Hello" * first).lstrip() + text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("repeated", ["😀", "東京", "é", "a€😀ü"], ids=ascii)
def test_a_prompt_that_ends_in_bytes(repeated):
    """Anywhere, also within a character, which comes out with the answer then."""
    tokenizer, vocabulary = sentencepiece_like()
    prompt_text, text = "日本é😀語", repeated * 12
    every = bytes_of(prompt_text + text, vocabulary)
    for length in range(1, len(prompt_text.encode()) + 1):
        whole = prompt_text.encode()[:length].decode(errors="ignore")
        pieces = stream(tokenizer, every[length:], every[:length])
        assert "".join(pieces) == (prompt_text + text)[len(whole) :], f"{length} bytes of the prompt"
        few = stream(tokenizer, every[length:], every[:length][-PROMPT_CONTEXT:])
        assert few == pieces, "the last few tokens of a prompt are enough"


def test_prompts_of_no_text():
    """No token, or bytes that are no character in the making: nothing of the prompt is in the answer."""
    tokenizer, vocabulary = sentencepiece_like()
    for prompt in ([], [vocabulary["<0xFF>"]] * 20):
        assert "".join(stream(tokenizer, [vocabulary["▁a"], vocabulary["▁the"]], prompt)).lstrip() == "a the"


def test_a_long_answer_costs_the_same_at_its_end():
    """The window that is decoded for each token stays short."""
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return "".join(chr(97 + token) for token in ids)

    ids = [i % 26 for i in range(5000)]
    pieces = stream_with(Detokenizer(decode), ids, prompt=range(20))
    assert longest < 40
    assert "".join(pieces) == decode(ids)


def test_special_tokens_of_the_prompt_are_no_text():
    tokenizer = byte_level()
    tokenizer.hf.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    special = tokenizer.hf.convert_tokens_to_ids("<|end|>")
    assert "".join(stream(tokenizer, tokenizer.encode("ok"), prompt=[special] * 3)) == "ok"


def test_random_tokens_of_a_real_tokenizer(smollm2):
    """Any sequence, also one that no text gives: the pieces are the whole."""
    tokenizer = Tokenizer.load(str(smollm2))
    pick = random.Random(1)
    for _ in range(150):
        ids = [pick.randrange(49152) for _ in range(pick.randrange(1, 60))]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
    ids = tokenizer.encode(TEXT)
    assert "".join(stream(tokenizer, ids)) == TEXT


def test_chat(smollm2):
    tokenizer = Tokenizer.load(str(smollm2))
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert tokenizer.hf.decode(ids).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(UnsupportedError, match="no chat template"):
        byte_level().encode_chat([{"role": "user", "content": "Hi"}])
    tokenizer.hf.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidArgumentError, match="roles must alternate"):
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])


def test_a_hub_model_without_a_tokenizer(tmp_path, monkeypatch):
    """It takes token ids. The hub is a cache on disk here."""
    import huggingface_hub.constants
    import transformers.utils.hub
    from models import save_tiny_model
    from pagedcore.models import load

    repository = tmp_path / "models--someone--ids-only"
    save_tiny_model("llama", repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for module in (huggingface_hub.constants, transformers.utils.hub.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    model = load("someone/ids-only")
    assert model.tokenizer is None
    assert model.stop_token_ids == (2,)
    (repository / "snapshots" / ("0" * 40) / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match="could not be read"):
        Tokenizer.load("someone/ids-only")


def test_none_and_broken(tmp_path):
    assert Tokenizer.load(str(tmp_path)) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match="could not be read"):
        Tokenizer.load(str(tmp_path))
