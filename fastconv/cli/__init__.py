"""The fastconv command. Each sub-command lives in a module of its name and imports what it needs when it runs."""

import click

from fastconv.cli.bench import bench
from fastconv.cli.claims import claims
from fastconv.cli.classify import classify
from fastconv.cli.demo import demo
from fastconv.cli.doctor import doctor
from fastconv.cli.explain import explain
from fastconv.cli.machine import version
from fastconv.cli.profile import profile
from fastconv.cli.tune import tune


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version(), prog_name="fastconv")
def main() -> None:
    """SqueezeNet and MobileNet at the hardware's speed, inside PyTorch."""


for command in (demo, classify, bench, claims, profile, tune, explain, doctor):
    main.add_command(command)
