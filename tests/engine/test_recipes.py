"""Every recipe that ships is a whole configuration, and the command line finds it by name."""

import pytest
import yaml

from balcaprl.cli.main import RECIPES, main
from balcaprl.config import TrainConfig

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def test_the_recipes_of_the_readme_ship():
    assert {"demo", "judge", "caprl", "rubicap"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_and_found(name, capsys):
    config = TrainConfig.model_validate(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))
    assert any(weight > 0 for weight in config.reward.weights)
    with pytest.raises(SystemExit) as ended:
        main(["train", name, "--print_config"])
    assert ended.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert TrainConfig.model_validate({k: v for k, v in shown.items() if k != "config"}) == config
