"""Reading a config from a command line: what is accepted, and one clear line for every mistake."""

import sys
from typing import Any

import pytest

from swat_jax import config_file, recipe
from swat_jax.errors import UsageError

DIGITS = "configs/digits.py"


def parse(*arguments) -> Any:
    return config_file.Parser("A program.").parse_args(arguments).config


def test_without_config():
    assert parse() is None


@pytest.mark.parametrize("form", [[f"--config={DIGITS}:erk95"], ["--config", f"{DIGITS}:erk95"]])
def test_method_is_the_argument_of_the_file(form):
    config = parse(*form)
    assert (config.sparsity.method, config.sparsity.weight) == ("erk95", 0.95)


def test_overrides_of_every_kind():
    config = parse(
        *("--config.batch_size=32", "--config", DIGITS, "--config.devices", "2"),
        *("--config.optimizer.learning_rate=0.5", "--config.optimizer.schedule.milestones=(3, 5)"),
        *("--config.deterministic", "--noconfig.data.on_device", "--config.data.data_dir=/a=b"),
        "--config.model.dropout_rate=0.25",
    )
    assert (config.batch_size, config.devices, config.optimizer.learning_rate) == (32, 2, 0.5)
    assert config.optimizer.schedule.milestones == (3, 5)
    assert config.deterministic is True
    assert config.data.on_device is False
    assert (config.data.data_dir, config.model.dropout_rate) == ("/a=b", 0.25)


def test_other_flags_of_the_program():
    parser = config_file.Parser("A program.")
    parser.add_argument("--workdir")
    options = parser.parse_args(["--workdir=w", f"--config={DIGITS}", "--config.seed=4"])
    assert (options.workdir, options.config.seed) == ("w", 4)


def test_imagenet_period_and_learning_rate_follow_the_batch_size():
    def values(*arguments):
        config = parse("--config=configs/imagenet_resnet50.py:u80", *arguments)
        return config.sparsity.threshold_every_steps, config.optimizer.learning_rate

    assert values() == (1001, 0.1)
    assert values("--config.batch_size=1024") == (250, 0.4)
    assert values("--config.batch_size=512", "--config.sparsity.threshold_every_steps=1") == (
        1,
        0.2,
    )
    assert values("--config.optimizer.learning_rate=0.3", "--config.batch_size=512") == (500, 0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nofile.py"], "no file 'nofile.py'"),
        (["--config=configs"], "no file 'configs'"),
        (["--config"], "needs a file"),
        (["--config="], "needs a file"),
        (["--config", "--config.seed=1"], "needs a file"),
        ([f"--config={DIGITS}:u90x"], "'u90x', allowed"),
        ([f"--config={DIGITS}:"], "'', allowed"),
        (
            [f"--config={DIGITS}", "--config.sparsity.wieght=1"],
            r"wieght; did you mean config\.sparsity\.weight\?$",
        ),
        ([f"--config={DIGITS}", "--config.sparsity.zzz=1"], "key config.sparsity.zzz; .* has: act"),
        (
            [f"--config={DIGITS}", "--config.optimiser.lr=1"],
            r"^unknown key config\.optimiser; did you mean config\.optimizer\?$",
        ),
        ([f"--config={DIGITS}", "--noconfig.on_device"], r"mean config\.data\.on_device\?"),
        ([f"--config={DIGITS}", "--config.lr=1"], "unknown key config.lr; config has: batch_size,"),
        (["--confg=x.py"], r"unknown flag --confg; did you mean --config\?$"),
        (["--config=configs/digit.py"], r"'; did you mean configs/digits\.py\?; --list prints"),
        (["--config=elsewhere/cifar10_resnet81.py"], "mean configs/cifar10_resnet18.py or "),
        (["--config=configs/imagenet_resnet50.py:u9O"], r"did you mean u90\?$"),
        ([f"--config={DIGITS}", "--config.seed.x=1"], "config.seed is a value"),
        ([f"--config={DIGITS}", "--config.seed=x"], "--config.seed=x: invalid literal"),
        ([f"--config={DIGITS}", "--config.seed"], "seed"),
        ([f"--config={DIGITS}", "--config.sparsity=3"], "--config.sparsity=3"),
        ([f"--config={DIGITS}", "--config.data.on_device=perhaps"], "on_device"),
        ([f"--config={DIGITS}", "--wrkdir=w"], "wrkdir"),
        ([f"--config={DIGITS}", "u90"], "unexpected argument 'u90'"),
        ([f"--config={DIGITS}", "-x"], "unknown flag --x"),
        (["--config.seed=1"], "--config.seed: --config is missing"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)


GOOD = """
from swat_jax import recipe
def get_config(method="u90"):
    config = recipe.digits()
    config.model.name = "resnet8"
    config.epochs = 1
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no get_config"),
        ("def get_config(:", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config(method=''): return 1 / 0", "ZeroDivisionError"),
        ("def get_config(method=''): raise ValueError('two\\nlines')", "two; lines"),
        ("def get_config(): return 1", "TypeError"),
        ("def get_config(method=''): return {}", "must return a ConfigDict, got dict"),
        (f"{GOOD}    config.wieght = 1\n    return config", "unknown key config.wieght"),
        (f"{GOOD}    del config.data.std\n    return config", "config.data.std is missing"),
        (
            f"{GOOD.replace('config.epochs', 'epochs')}    return config",
            "config.epochs must be set",
        ),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    before = set(sys.modules)
    with pytest.raises(UsageError, match=message) as caught:
        config_file.load(f"{path}:u90")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not {name for name in set(sys.modules) - before if "broken" in name}


def test_a_file_that_is_no_python_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1")
    with pytest.raises(UsageError, match="not a Python file"):
        config_file.load(str(path))


def test_base_is_incomplete_until_filled():
    with pytest.raises(UsageError, match="must be set"):
        recipe.check_keys(recipe.base())
