"""N9: a plain loop in torch and transformers, and nothing of ours, gives the same losses and weights."""

import pytest
import torch

RATE, DECAY, WARMUP, CLIP = 1e-2, 0.1, 2, 1.0


def reference_training(model, rows, *, rows_per_step, rows_per_forward, epochs):
    """Fine-tune on rows of (ids, weights) in the given order; returns the mean loss of every step.

    Everything a reader expects, as plainly as it can be said: pad, forward, log-softmax, pick, weigh, divide by the
    weights of the step.
    """
    from transformers import get_scheduler

    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}] + (
        [{"params": others, "weight_decay": 0.0}] if others else []
    )
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8)
    steps_per_epoch = -(-len(rows) // rows_per_step)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=WARMUP, num_training_steps=epochs * steps_per_epoch)
    losses = []
    for _ in range(epochs):
        for start in range(0, len(rows), rows_per_step):
            step_rows = rows[start : start + rows_per_step]
            total_weight = sum(float(weights.sum()) for _, weights in step_rows)
            step_loss = 0.0
            for first in range(0, len(step_rows), rows_per_forward):
                some = step_rows[first : first + rows_per_forward]
                longest = max(len(ids) for ids, _ in some)
                ids_BT = torch.zeros(len(some), longest, dtype=torch.long)
                weights_BT = torch.zeros(len(some), longest)
                mask_BT = torch.zeros(len(some), longest, dtype=torch.long)
                for i, (ids, weights) in enumerate(some):
                    ids_BT[i, : len(ids)] = torch.tensor(ids)
                    weights_BT[i, : len(ids)] = torch.tensor(weights)
                    mask_BT[i, : len(ids)] = 1
                logits = model(input_ids=ids_BT, attention_mask=mask_BT).logits
                log_probabilities = torch.log_softmax(logits[:, :-1], dim=-1)
                picked = log_probabilities.gather(-1, ids_BT[:, 1:, None])[..., 0]
                loss = -(picked * weights_BT[:, 1:]).sum() / total_weight
                loss.backward()
                step_loss += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(step_loss)
    return losses


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("layout", ["padded", "flat"])
def test_the_loop_is_a_plain_loop(bench, lora, layout):
    """N9, with accumulation, ragged lengths, fractional weights and last partial windows over two epochs."""
    examples = bench.examples(29)
    ours, theirs = bench.model(lora=lora), bench.model(lora=lora)
    plan = bench.plan(examples, batch_size=3, accumulation=2, epochs=2, shuffle_seed=None, layout=layout)
    training = bench.training(
        ours, plan, learning_rate=RATE, weight_decay=DECAY, warmup_steps=WARMUP, max_grad_norm=CLIP
    )
    results = training.run()
    rows = [(example.input_ids, example.weights) for example in examples]
    losses = reference_training(theirs, rows, rows_per_step=6, rows_per_forward=4, epochs=2)

    assert len(losses) == len(results) == 10
    assert [result.train_mean_nll for result in results] == pytest.approx(losses, rel=2e-6)
    assert losses[-1] < losses[0]
    expected = {name: p.detach() for name, p in theirs.named_parameters() if p.requires_grad}
    assert bench.relative_difference(training.weights(), expected) < 1e-5
