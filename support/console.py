"""The terminal: flags made from a dataclass, one-line errors, printed lines and progress."""
import argparse
import dataclasses
import importlib
import inspect
import os
import pathlib
import re
import sys
import typing

from tqdm import tqdm


class MacError(ValueError):
    """A mistake of the user or a broken file: one line, and the exit status."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def command(main):
    """Make `main(argv)` a program: errors that a user can mend become one line and a status."""
    def program(argv=None):
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # the shell closed it: `2>&-`
                setattr(sys, name, open(os.devnull, "w"))
            if hasattr(getattr(sys, name), "reconfigure"):
                getattr(sys, name).reconfigure(errors="replace")  # a terminal may not know "±"
        try:
            return main(sys.argv[1:] if argv is None else argv) or 0
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        except (MacError, OSError, MemoryError, RuntimeError) as error:
            text = str(error)
            if isinstance(error, RuntimeError) and not re.search("(out of|allocate) memory", text):
                raise
            if getattr(error, "filename", None):
                text = f"cannot use {error.filename}: {error.strerror}"
            print("error:", " ".join(text.split()), file=sys.stderr)
            return getattr(error, "status", 2)
    return program


def say(text):
    """Print a line at once, above a progress bar. If the reader has gone, only printing ends."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress(tqdm):
    """A progress bar; without a terminal a plain line every `interval` seconds instead."""

    def __init__(self, *args, interval=60, **options):
        self.plain = not sys.stderr.isatty()
        if self.plain:  # `say` would redraw a bar on standard error
            options.update(file=open(os.devnull, "w"), leave=False, delay=1e-9, miniters=1)
            options["mininterval"] = interval
        super().__init__(*args, **options)

    def display(self, msg=None, pos=None):
        if not self.plain:
            super().display(msg, pos)
        elif msg is None:
            say(str(self))


class Parser(argparse.ArgumentParser):
    """Takes underscores in flags for dashes; gives tuples. Raises MacError for a mistake."""

    def parse_args(self, argv):
        words = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
        given = super().parse_args(words)
        vars(given).update({k: tuple(v) for k, v in vars(given).items() if isinstance(v, list)})
        return given

    def error(self, message):
        raise MacError(f"{message} (--help lists the flags)")


def add_flags(parser, Config):
    """Give `parser` a flag for each field of dataclass Config. The comment beside the field, which
    deeper comment lines may continue, is its help. A flag that is not given leaves no value."""
    source = "".join(inspect.getsource(c) for c in Config.__mro__ if dataclasses.is_dataclass(c))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*(?:\n {5,}# .*)*)", source, re.MULTILINE))
    for field in dataclasses.fields(Config):
        default = ("on" if field.default else "off") if field.type is bool else field.default
        rules = {"default": argparse.SUPPRESS, "help": re.sub(r"\n *#", "", comments[field.name])
                 + f" (default: {default})" * (default != "")}
        if field.type is bool:
            rules["action"] = argparse.BooleanOptionalAction  # --no-... undoes a preset's
        elif typing.get_args(field.type):
            rules["choices"] = typing.get_args(field.type)
        elif field.type is tuple:
            rules.update(type=float, nargs=len(field.default) or "+", metavar="X")
        else:
            rules.update(type=field.type, metavar="X")
        parser.add_argument(flag(field.name), **rules)


def flag(name):
    """The flag of a field: eval_flow -> --eval-flow"""
    return "--" + name.replace("_", "-")


def home(text, flag):
    """The path `text`, which may begin with ~ and was given by `flag`. Raises MacError."""
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise MacError(f"there is no home folder for {text}: set {flag}") from error


def optional(module, what):
    """Import a module that only some uses need. Raises MacError, which says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.replace("torch.utils.", "").split(".")[0]
        raise MacError(f"{what} needs {package}: pip install {package}") from None
