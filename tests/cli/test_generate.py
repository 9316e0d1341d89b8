"""`nsa generate`: the text, its streaming, the folders it takes, and what it refuses."""

import io
import shutil

import pytest
import torch

from nsa.cli import main
from nsa.cli.generate import GenerateArguments, TextStream, run
from nsa.data import ByteTokenizer, load_tokenizer
from nsa.terminal import printable
from saved_runs import save_model
from tiny_models import tiny_model

PROMPT = "We choose to go on, all of us together"


@pytest.fixture(scope="module")
def model():
    return tiny_model("nsa", "sliding_attention", vocab_size=259).float()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    ByteTokenizer().save(path)
    return path


def text(folder, prompt=PROMPT, **options) -> str:
    out = io.StringIO()
    assert run(GenerateArguments(folder, prompt, **options), out) == 0
    return out.getvalue()


def test_greedy_text_is_what_an_argmax_loop_gives(model, folder):
    ids = torch.tensor([ByteTokenizer().encode(PROMPT)])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(30):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == ByteTokenizer.eos_id:
                break
    expected = printable(ByteTokenizer().decode(ids[0, start:].tolist())) + "\n"
    assert text(folder, greedy=True, max_new_tokens=30) == expected


def test_a_seed_repeats_the_text_and_options_change_it(folder):
    first = text(folder, max_new_tokens=40, temperature=1.5, top_k=0, top_p=1.0, seed=1)
    assert first == text(folder, max_new_tokens=40, temperature=1.5, top_k=0, top_p=1.0, seed=1)
    assert first != text(folder, max_new_tokens=40, temperature=1.5, top_k=0, top_p=1.0, seed=2)
    assert text(folder, max_new_tokens=40, top_k=1) == text(folder, max_new_tokens=40, greedy=True)
    assert text(folder, max_new_tokens=40, top_p=1e-6) == text(folder, max_new_tokens=40, greedy=True)


def test_the_newest_complete_checkpoint_of_a_run_is_taken(model, folder, tmp_path):
    other = tiny_model("nsa", "sliding_attention", vocab_size=259, seed=9).float()
    for step, saved in ((5, other), (10, model), (15, other)):
        save_model(tmp_path / "checkpoints", step, saved)
    (tmp_path / "checkpoints" / "step_000015" / "model.safetensors").write_bytes(b"cut off")
    assert text(tmp_path, greedy=True) == text(folder, greedy=True)


class Recorder(io.StringIO):
    """Keeps each write."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def write(self, text):
        self.writes.append(text)
        return super().write(text)


def streamed(tokenizer, ids) -> list[str]:
    out = Recorder()
    stream = TextStream(tokenizer, out)
    stream.put(torch.tensor([[1, 2, 3]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    return out.writes


def test_characters_appear_whole_and_as_soon_as_they_are_complete(folder):
    content = "né €, 🎈 日本"
    for tokenizer in (ByteTokenizer(), load_tokenizer(folder)):
        assert streamed(tokenizer, tokenizer.encode(content)) == [*content, "\n"]


@pytest.mark.parametrize("tail", [[0xE2, 0x82], [0x80, 0x80, 65], [0xF0, 0x9F, 0x8E], [0x80] * 5])
def test_bytes_that_are_no_text_are_replaced_and_nothing_is_lost(folder, tail):
    ids = [*b"ab", *tail]
    for tokenizer in (ByteTokenizer(), load_tokenizer(folder)):
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) + "\n"


def test_words_keep_their_spaces():
    """A tokenizer that drops the space before the first word it decodes."""

    class Words(ByteTokenizer):
        def decode(self, ids):
            return " ".join(f"w{i}" for i in ids)

    assert streamed(Words(), [4, 5, 6]) == ["w4", " w5", " w6", "\n"]


def refused(capsys, *arguments) -> str:
    assert main(["generate", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_new_tokens", 0, "--max_new_tokens must be from 1 to"),
        ("temperature", 0, "--temperature must be above 0, not 0.0; --greedy"),
        ("temperature", "nan", "--temperature must be a finite number"),
        ("top_k", -1, "--top_k must be from 0 to"),
        ("top_p", 1.5, "--top_p must be above 0 and at most 1, not 1.5"),
        ("seed", -3, "--seed must be from 0 to"),
        ("device", "gpu0", "gpu0"),
    ],
)
def test_options_out_of_range_are_refused(folder, capsys, option, value, message):
    assert message in refused(capsys, folder, "--prompt", "x", f"--{option}", value)


def test_folders_without_a_model_are_refused(folder, tmp_path, capsys):
    assert "there is no folder" in refused(capsys, tmp_path / "none", "--prompt", "x")
    assert "neither a transformers model folder" in refused(capsys, tmp_path, "--prompt", "x")
    (tmp_path / "config.yaml").touch()
    assert "no complete checkpoint" in refused(capsys, tmp_path, "--prompt", "x")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"cut off")
    assert "cannot be loaded" in refused(capsys, broken, "--prompt", "x")
    (broken / "model.safetensors").unlink()
    assert "cannot be loaded" in refused(capsys, broken, "--prompt", "x")


def test_prompts_that_the_model_cannot_read_are_refused(folder, model, tmp_path, capsys):
    assert "the prompt is empty" in refused(capsys, folder, "--prompt", "")
    assert "half of a surrogate pair" in refused(capsys, folder, "--prompt", "a\udcff")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"go": 0, "on": 1, "<unk>": 2, "<eos>": 300}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>").save_pretrained(tmp_path)
    assert "cannot encode 'a', 'w', 'y' of the prompt" in refused(capsys, tmp_path, "--prompt", "go on way")
    words = Tokenizer(models.WordLevel({"go": 0, "on": 270, "<eos>": 1}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(tmp_path)
    assert "gives token 270 but the model knows 0..258" in refused(capsys, tmp_path, "--prompt", "go on")
