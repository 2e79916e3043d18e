"""The command line: one file a group of verbs, each verb one call of the library."""

from jaxlm.cli.app import main as main
