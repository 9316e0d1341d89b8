"""Training: gradients, the loss, checkpointed activations, and `transformers.Trainer`."""

import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from nsa.hf import NSAForCausalLM
from tiny_models import left_padded, tiny_config, tiny_model

LAYERS = ("nsa", "full_attention", "sliding_attention")
IDS = torch.arange(120).reshape(2, 60) * 11 % 61


def loss_of(logits, labels):
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compression", ["mean", "conv", "mlp"])
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(compression, packed):
    model = tiny_model(*LAYERS, compression=compression, tie_word_embeddings=False)
    if packed:
        bounds = torch.tensor([0, 70, 120], dtype=torch.int32)
        model(IDS.reshape(1, -1), labels=IDS.reshape(1, -1), cu_seqlens=bounds).loss.backward()
    else:
        model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_loss_is_the_cross_entropy_of_the_next_token():
    model, labels = tiny_model(), IDS.clone()
    labels[0, :20] = -100
    out = model(IDS, labels=labels)
    assert torch.allclose(out.loss, loss_of(out.logits[:, :-1], labels[:, 1:]), atol=1e-6)
    counted = model(IDS, labels=labels, num_items_in_batch=10).loss
    assert torch.allclose(counted, out.loss * (labels[:, 1:] != -100).sum() / 10, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_int32_ids_and_labels_train_as_int64_ones_do(packed):
    model = tiny_model(*LAYERS)
    ids = IDS.reshape(1, -1) if packed else IDS
    options = {"cu_seqlens": torch.tensor([0, 70, 120], dtype=torch.int32)} if packed else {}
    assert torch.equal(model(ids.int(), labels=ids.int(), **options).loss, model(ids, labels=ids, **options).loss)


def test_no_document_is_asked_to_predict_the_next_ones_first_token():
    model = tiny_model()
    bounds = torch.tensor([0, 25, 25, 60, 60], dtype=torch.int32)
    out = model(IDS[:1], labels=IDS[:1], cu_seqlens=bounds)
    inside = [i for i in range(59) if i != 24]
    assert torch.allclose(out.loss, loss_of(out.logits[0, inside], IDS[0, [i + 1 for i in inside]]), atol=1e-6)


def test_padding_moves_no_gradient():
    rows = [IDS[0], IDS[1, :30]]
    ids, mask = left_padded(rows)
    padded, plain = tiny_model(*LAYERS), tiny_model(*LAYERS)
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 30] = -100  # its first token, which nothing real comes before
    padded(ids, attention_mask=mask, labels=labels, num_items_in_batch=1).loss.backward()
    sum(plain(row[None], labels=row[None], num_items_in_batch=1).loss for row in rows).backward()
    for (name, a), b in zip(padded.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4), name


def test_logits_can_be_kept_for_the_last_tokens_or_for_chosen_ones():
    with torch.no_grad():
        model = tiny_model()
        logits = model(IDS).logits
        last, chosen = (model(IDS, logits_to_keep=keep).logits for keep in (3, torch.tensor([5, 40])))
        assert torch.allclose(last, logits[:, -3:], atol=1e-12)
        assert torch.allclose(chosen, logits[:, [5, 40]], atol=1e-12)


def test_no_cache_is_made_where_gradients_are_needed():
    model = tiny_model(*LAYERS)
    assert model(IDS, use_cache=True).past_key_values is None
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    assert cache is not None
    with pytest.raises(ValueError, match="the cache keeps no gradients"):
        model(IDS, past_key_values=cache)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_with_checkpointed_activations(reentrant):
    plain, checkpointed = tiny_model(*LAYERS).train(), tiny_model(*LAYERS).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model(IDS, labels=IDS).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-9), name


@pytest.mark.parametrize("flattened", [False, True])
def test_trainer_of_transformers_lowers_the_loss(tmp_path, flattened):
    torch.manual_seed(0)
    model = NSAForCausalLM(tiny_config(*LAYERS, initializer_range=0.1))
    starts = torch.arange(64).tolist()
    rows = [{"input_ids": [(start + 3 * i) % 61 for i in range(30 + start % 20)]} for start in starts]
    if not flattened:
        rows = [{"input_ids": row["input_ids"][:30], "labels": row["input_ids"][:30]} for row in rows]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=12,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="steps",
        save_steps=12,
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True) if flattened else None
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    saved = NSAForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), model.parameters(), strict=True))


def test_trainer_of_transformers_resumes_from_its_checkpoint(tmp_path):
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS.reshape(6, 20)]
    options = {"max_steps": 4, "save_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(tmp_path, per_device_train_batch_size=2, **options)
    whole, again = tiny_model(*LAYERS), tiny_model(*LAYERS)
    Trainer(whole, arguments, train_dataset=rows).train()
    Trainer(again, arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_autocast_trains_fp32_weights_in_bf16():
    model = tiny_model(*LAYERS, compression="conv").float()
    exact = model(IDS, labels=IDS).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert abs(loss - exact) < 0.05 * exact
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
