"""The report verb: report.html of a run folder, one file that asks nothing of the network."""

from __future__ import annotations

import os
from pathlib import Path

import jinja2

from instructax.config import Config
from instructax.report import figures, sections
from instructax.report.folder import Row, RunFolder, read

MAX_CHARACTERS = 1500


def run(config: Config) -> Path:
    """Write the report of the config's run folder and say where it lies."""
    path = write_report(Path(config.run_dir) / config.name)
    print(f"report: {path}")
    return path


def write_report(folder: Path) -> Path:
    """Write report.html into a run folder, whole or partial, and return its path.

    Raises UserError for a folder that is not there, that holds nothing to report, or that has a
    broken file (with its line).
    """
    found = read(Path(folder))
    page = _environment().get_template("page.html.j2").render(_context(found))
    path = found.path / "report.html"
    draft = path.with_name("report.html.part")
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, path)
    return path


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["missing"] = figures.NOT_MEASURED
    environment.filters["policy"] = figures.policy
    environment.filters["fixed"] = figures.fixed
    environment.filters["shorten"] = _shorten
    environment.tests["number"] = lambda v: isinstance(v, (int, float))
    return environment


def _context(run: RunFolder) -> Row:
    arms = sections.main_arms(run)
    method, sizes = figures.settings(run)
    return {
        "title": str(run.config.get("name") or run.path.resolve().name),
        "lede": figures.lede(run),
        "notes": run.notes,
        "win_rates": sections.win_rates(run),
        "weights": run.summary.get("weights_judged"),
        "headline": figures.headline(run),
        "stages": figures.stage_table(run),
        "supervised": sections.supervised(run),
        "arm_legend": [sections.legend(name) for name in arms],
        "many_seeds": len(run.seeds) > 1,
        "ppo": sections.panels(run, arms, sections.PPO_MAIN, "PPO iteration"),
        "ppo_details": sections.panels(run, arms, sections.PPO_DETAILS, "PPO iteration"),
        "forgetting": figures.forgetting_table(run),
        "forgetting_panels": sections.forgetting(run, arms),
        "overoptimisation": sections.overoptimisation(run),
        "reward_model": sections.reward_model(run),
        "gold": figures.gold_table(run),
        "kinds": sections.kinds(run),
        "samples": sections.samples(run),
        "over_time": sections.over_time(run, arms),
        "settings_method": method,
        "settings_sizes": sizes,
        "curation": figures.leaf_table(run.curation, ("what", "count")) if run.curation else None,
        "summary": figures.summary_table(run) if run.summary else None,
        "environment": figures.leaf_table(run.environment, ("what", "value"))
        if run.environment
        else None,
        "command": figures.command(run),
    }


def _shorten(text: object) -> str:
    words = str(text).strip()
    left = len(words) - MAX_CHARACTERS
    return words if left <= 0 else f"{words[:MAX_CHARACTERS]} … [{left:,} more characters]"
