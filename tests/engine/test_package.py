"""The package's own names load what they need only when they are asked for."""

import subprocess
import sys

import pytest

import balcaprl


def test_the_names_are_those_of_their_modules():
    from balcaprl.config import TrainConfig
    from balcaprl.training.trainer import Trainer

    assert (balcaprl.Trainer, balcaprl.TrainConfig) == (Trainer, TrainConfig)
    assert set(balcaprl.__all__) == {"Trainer", "TrainConfig"}


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'balcaprl' has no attribute 'Trainr'"):
        balcaprl.Trainr  # noqa: B018


@pytest.mark.parametrize(("name", "loads_torch"), [("TrainConfig", False), ("Trainer", True)])
def test_the_configuration_loads_no_torch_and_the_trainer_does(name, loads_torch):
    code = f"import sys, balcaprl; assert 'torch' not in sys.modules; balcaprl.{name}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == str(loads_torch)


def test_a_submodule_is_found_after_its_import_only():
    code = "import balcaprl, balcaprl.config; balcaprl.config; assert not hasattr(balcaprl, 'policy')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
