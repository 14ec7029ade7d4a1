"""Makes the judge that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from balcaprl.config import EndpointConfig, RewardConfig
from balcaprl.rewards.judge import Judge, NoJudge


def make_judge(
    config: RewardConfig,
    data_kind: str,
    *,
    endpoint: EndpointConfig | None = None,
    data_path: Path | None = None,
    run_dir: Path | None = None,
    references: Sequence[str] = (),
) -> Judge:
    """Make the judge that ``reward.judge`` names.

    ``auto`` names the scene judge for drawn scenes and the lexical judge for all other data.

    Args:
        config: the reward section.
        data_kind: ``data.kind``.
        endpoint: how the ``endpoint`` judge reaches its model.
        data_path: ``data.path``; prepared reference units lie beside it.
        run_dir: folder in which the endpoint judge keeps its cost and the refused calls; None: it keeps no files.
        references: some references of the data set, for a judge that does not know every language.

    Raises:
        ValueError: the scene judge is asked for, but the data are not drawn scenes; the endpoint is not configured; or
            the judge does not know the language of the references.
        ImportError: the endpoint judge's libraries are not installed.
    """
    scenes = data_kind == "scenes"
    if config.judge == "endpoint":
        from balcaprl.rewards.endpoint.judge import EndpointJudge

        return EndpointJudge.from_config(config, endpoint or EndpointConfig(), data_path=data_path, run_dir=run_dir)
    if config.judge == "none":
        return NoJudge()
    if config.judge == "scene" and not scenes:
        raise ValueError(
            f"reward.judge: scene knows drawn scenes only, data.kind is {data_kind}; set it to auto or lexical"
        )
    if config.judge == "scene" or (config.judge == "auto" and scenes):
        from balcaprl.rewards.scenes.judge import SceneJudge

        return SceneJudge()
    # A judge that is added to the configuration but has no case above must not silently become the lexical one.
    assert config.judge in ("auto", "lexical"), config.judge
    from balcaprl.rewards.lexical.judge import LexicalJudge
    from balcaprl.rewards.lexical.language import check_references

    check_references(references)
    return LexicalJudge()


def close_judge(judge: Judge) -> None:
    """Free what a judge holds, if it holds anything."""
    close: Any = getattr(judge, "close", None)
    if callable(close):
        close()
