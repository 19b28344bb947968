"""A loss of the user's own is minimized as llmtune's own is: a sum, divided once by the window's trained tokens."""

import pytest

from llmtune import Trainer, train
from llmtune.engine.own_loss import digest_of_code
from llmtune.errors import CheckpointError, UsageError
from rank_helpers import in_two_ranks
from training_helpers import lines_of, weights_of

FEW = ("training.max_steps=2", "checkpoint.every_steps=1", "training.lr_schedule=constant")


def quiet(line):
    """Say nothing."""


def usual(log_probs, weights):
    return -(weights * log_probs).sum()


def double(log_probs, weights):
    return 2 * usual(log_probs, weights)


def test_the_usual_loss_as_an_own_function_is_the_usual_training(config_of):
    whole, own, cut = (
        lines_of(train(config_of(*FEW, *more, name=name), loss=loss, print_line=quiet).folder)
        for name, loss, more in (
            ("whole", None, ()),
            ("own", double, ("training.max_grad_norm=null",)),
            (
                "cut",
                double,
                ("training.max_grad_norm=null", "training.batch_size=4", "training.gradient_accumulation_steps=1"),
            ),
        )
    )
    trained, halved, recut = ([line for line in lines if "learning_rate" in line] for lines in (whole, own, cut))
    assert "train_mean_nll" not in halved[0]
    assert halved[0]["train_loss"] == pytest.approx(2 * trained[0]["train_mean_nll"], rel=1e-6)
    assert halved[0]["grad_norm"] == pytest.approx(2 * trained[0]["grad_norm"], rel=1e-5)
    assert [line["train_loss"] for line in recut] == pytest.approx([line["train_loss"] for line in halved], rel=1e-5)
    assert any("eval_mean_nll" in line for line in own)


def focal(log_probs, weights):
    return -(weights * (1 - log_probs.exp()) ** 2 * log_probs).sum()


def test_two_processes_minimize_an_own_loss_as_one_does(config_of):
    """Rows of one window differ in length, so that the processes have unequal numbers of trained tokens."""
    steps = ("training.max_steps=4", "training.lr_schedule=constant", "training.batch_size=4")

    def of_two():
        train(config_of(*steps, name="two"), loss=focal, print_line=quiet)
        return 0

    codes, said = in_two_ranks(of_two)
    assert codes == [0, 0], said
    one = train(config_of(*steps, name="one"), loss=focal, print_line=quiet).folder
    for key in ("train_loss", "grad_norm", "eval_mean_nll"):
        alone, together = (
            [line[key] for line in lines_of(folder) if key in line] for folder in (one, one.parent / "two")
        )
        assert len(alone) >= 2
        assert together == pytest.approx(alone, rel=2e-6), key


def test_a_run_goes_on_with_the_same_loss_alone(config_of):
    whole = Trainer(config_of(*FEW, name="run"), loss=double, print_line=quiet)
    for step in whole.steps():
        if step.step == 1:
            break
    folder = whole.result().folder
    for other in (None, usual):
        with pytest.raises(CheckpointError, match=r"digests\.loss"):
            Trainer.resume(folder, loss=other, print_line=quiet).train()
    Trainer.resume(folder, loss=double, print_line=quiet).train()
    undisturbed = train(config_of(*FEW, name="undisturbed"), loss=double, print_line=quiet)
    assert weights_of(folder) == weights_of(undisturbed.folder)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda log_probs, weights: -log_probs, r"a tensor of shape \(\d+,\)"),
        (lambda log_probs, weights: -float(log_probs.detach().sum()), "returned -?[0-9.]+"),
        (lambda log_probs, weights: -log_probs.detach().sum(), "which no gradient reaches"),
    ],
)
def test_what_is_no_sum_is_refused_at_the_first_micro_batch(loss, says, config_of, tmp_path):
    with pytest.raises(UsageError, match=says):
        train(config_of(*FEW), loss=loss, print_line=quiet)


def test_a_digest_is_that_of_the_code():
    class Scaled:
        def __call__(self, log_probs, weights):
            return usual(log_probs, weights)

    assert digest_of_code(usual) == digest_of_code(usual) != digest_of_code(double)
    assert digest_of_code(Scaled()) == digest_of_code(Scaled())
    first, second = eval("lambda a, b: a"), eval("lambda a, b: a + b")
    assert digest_of_code(first) != digest_of_code(second)
