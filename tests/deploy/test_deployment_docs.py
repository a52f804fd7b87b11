"""docs/deployment.md shows the commands that tests/hosts runs."""

from __future__ import annotations

from pathlib import Path

DEPLOYMENT = (Path(__file__).resolve().parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")


def test_a_job_is_submitted_with_and_without_the_package() -> None:
    for part in (
        "--working-dir . -- tensorweave serve --config",
        "--working-dir . -- python -m tensorweave.cli.main serve --config",
        """--runtime-env-json '{"pip": ["${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"]}'""",
    ):
        assert part in DEPLOYMENT
