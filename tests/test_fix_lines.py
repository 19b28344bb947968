"""A fix is something that works: every command, option and setting that an error proposes is taken by the program."""

import pytest

import fix_lines


def test_no_fix_in_the_package_proposes_what_is_refused():
    fixes = fix_lines.written_fixes()
    assert len(fixes) > 300
    wrong = {place: problems for place, fix in fixes.items() if (problems := fix_lines.refused(fix))}
    assert wrong == {}


@pytest.mark.parametrize(
    ("fix", "problem"),
    [
        ("run `llmtune resum RUN`", "there is no command `llmtune resum RUN`"),
        ("run `llmtune train --allow-everything`", "`--allow-everything` is no option of `llmtune train`"),
        ("set `training.epoch: 1`", "there is no key `training.epoch`"),
        ("lower `training.lr`", "there is no key `training.lr`"),
        ("set `training.epochs: none`", "must be a number"),
        ("set `data.train_on=everything`", "must be one of"),
    ],
)
def test_a_fix_that_would_be_refused_is_found(fix, problem):
    (found,) = fix_lines.refused(fix)
    assert problem in found


def test_an_option_of_another_command_is_found():
    assert fix_lines.refused("say --allow-changes", "generate") == ["`--allow-changes` is no option of `generate`"]
    assert fix_lines.refused("say --allow-changes", "train") == []
    assert fix_lines.refused("say --allow-changes", "resume") == []
