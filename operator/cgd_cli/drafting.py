"""The commands that need a manifest and no cluster: init, validate, render, plan."""

from pathlib import Path
from typing import Annotated

import typer

from cgd_cli.app import Namespace, app, ask, console, save
from cgd_cli.errors import Wrong
from cgd_cli.sizes import GPUS
from cgd_cli.terminal import write

File = Annotated[Path, typer.Argument(help="A CGDRun as YAML; - reads standard input.")]
STDOUT = Path("-")


@app.command()
def init(
    source: Annotated[str, typer.Option("--from", help="Begin with this run, or with this manifest.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; - prints it.")] = Path("run.yaml"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")] = False,
    name: Annotated[str | None, typer.Option(help="The run's name.")] = None,
    student: Annotated[str | None, typer.Option(help="A model on the hub, or an s3:// folder.")] = None,
    teacher: Annotated[str | None, typer.Option(help="A model, or 'URL MODEL' of an endpoint.")] = None,
    prompts: Annotated[str | None, typer.Option(help="s3://, hf:// or configmap://")] = None,
    prompt_field: Annotated[str | None, typer.Option(help="The field with the question.")] = None,
    reference_field: Annotated[str | None, typer.Option(help="The field with the answer.")] = None,
    limit: Annotated[str | None, typer.Option(help="How many prompts.")] = None,
    objectives: Annotated[str | None, typer.Option(help="With commas: CGD,RefinedSFT")] = None,
    gpus: Annotated[str | None, typer.Option(help="GPUs of the training.")] = None,
    benchmarks: Annotated[str | None, typer.Option(help="With commas: MATH-500,GSM8K")] = None,
    storage: Annotated[str | None, typer.Option(help="Where the run stores its data: s3://bucket/folder.")] = None,
    storage_endpoint: Annotated[str | None, typer.Option(help="The URL of its S3 server.")] = None,
    storage_secret: Annotated[str | None, typer.Option(help="The Secret with its keys.")] = None,
    service_account: Annotated[str | None, typer.Option(help="The ServiceAccount of the pods.")] = None,
    hub_secret: Annotated[str | None, typer.Option(help="The Secret with a Hugging Face token.")] = None,
    namespace: Namespace = None,
) -> None:
    """Write a manifest from questions, options or another run. `none` leaves a field out."""
    given = {key.replace("_", "-"): value for key, value in locals().items() if value is not None}
    from cgd_cli import init as made
    from cgd_cli.manifest import body_of
    from cgd_cli.view import command, shell
    from cgd_operator import yamls

    if output != STDOUT and output.exists():
        raise Wrong(f"{output} exists: name another file with -o, or remove it")
    body = made.FIRST
    if source:
        is_file = Path(source).suffix in {".yaml", ".yml", ".json"} or Path(source).is_file()
        body = made.copied(body_of(Path(source)) if is_file else ask(namespace, lambda remote: remote.run(source)))
    options = {question.option for question in made.QUESTIONS}
    answers = {option: str(answer) for option, answer in given.items() if option in options}
    text = yamls.dump(made.filled(body, answers, ask=not yes))
    if output == STDOUT:
        write(text)
    else:
        save(output, text.encode())
        write(f"Next: {command('plan', str(output))}, then {shell('kubectl', 'apply', '-f', str(output))}\n")


@app.command()
def validate(
    file: File,
    published: Annotated[
        Path | None, typer.Option(help="The file that evaluation.published names: check it, too.")
    ] = None,
) -> None:
    """Check a manifest without a cluster: its fields, and whether a run can be planned from them."""
    from cgd_cli.manifest import published_tables, run_of
    from cgd_operator.planning.dag import plan

    run = run_of(file)
    children = plan(run)
    console.print(f"{file}: valid. {len(children)} children: {', '.join(child.stage for child in children)}")
    if published:
        from cgd_stages.results.published import contradictions

        tables = published_tables(run, file, published)
        rows = sum(len(table.rows) for table in tables)
        console.print(f"{published}: valid. {rows} rows of {run.spec.student.model}")
        for said in contradictions(tables):
            console.print(f"not the mean of its figures: {said}")


@app.command()
def render(
    file: File,
    generate_image: Annotated[str, typer.Option(help="Image of every stage but training.")] = "cgd-generate:latest",
    train_image: Annotated[str, typer.Option(help="Image of training.")] = "cgd-train:latest",
) -> None:
    """Print every object that the operator would create for a manifest, without a cluster."""
    from cgd_cli.manifest import run_of
    from cgd_operator import yamls
    from cgd_operator.planning.dag import BACKENDS, choose_backend, plan
    from cgd_operator.planning.manifests import Release, manifest, training_runtime

    run, release = run_of(file), Release(generate_image, train_image)
    backend = choose_backend(run, BACKENDS, ())
    assert backend is not None
    objects = []
    for child in plan(run, backend):
        if child.kind == "TrainJob":
            objects.append(training_runtime(run, child, release))
        objects.append(manifest(run, child, release))
    write("---\n".join(yamls.dump(item) for item in objects))


@app.command("plan")
def price(
    file: File,
    rows: Annotated[int | None, typer.Option(min=1, help="Default: prompts.limit.")] = None,
    student_params: Annotated[
        str, typer.Option(help="Such as 8B, or 30B-A3B; default: read off the model's name.")
    ] = "",
    teacher_params: Annotated[
        str, typer.Option(help="Such as 70B, or 235B-A22B; default: read off the model's name.")
    ] = "",
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "a100-80gb",
    gpu_hour: Annotated[float, typer.Option(min=0, help="Price of a GPU-hour.")] = 2.5,
    currency: Annotated[str, typer.Option(help="The currency of all prices.")] = "USD",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 200,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 700,
    critique: Annotated[int, typer.Option(min=1, help="Tokens of a critique.")] = 500,
    refinement: Annotated[int, typer.Option(min=1, help="Tokens of a refinement.")] = 800,
    thought: Annotated[int, typer.Option(min=0, help="Tokens of a thought, where a model thinks.")] = 4000,
    input_million: Annotated[float, typer.Option(min=0, help="Price of a million tokens read at the endpoint.")] = 0.0,
    output_million: Annotated[float, typer.Option(min=0, help="Price of a million written at the endpoint.")] = 0.0,
    read_models: Annotated[
        bool,
        typer.Option(
            "--read-models",
            help="Read the models' config.json and headers (a folder, S3, the hub): take their sizes from there, and "
            "say what prepare would refuse.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Estimate what a run will cost, stage by stage, and whether its models fit, without a cluster."""
    from cgd_cli.estimate import Assumptions, Size
    from cgd_cli.manifest import run_of
    from cgd_cli.price import price_json, price_table
    from cgd_cli.sizes import active_in, size_in

    def size(role: str, model: str, option: str, read: Size | None) -> Size:
        if read and not option:
            return read
        if (found := size_in(option or model)) is None:
            raise Wrong(
                f"{option or model} names no number of parameters: add an option such as --{role}-params 8B (47B-A13B: "
                "a mixture of experts, of which a token meets 13B), or --read-models"
            )
        return Size(found, active_in(option) or active_in(model) or found)

    run = run_of(file)
    if run.spec.placement.accelerator == "none":
        raise Wrong(f"{file} asks for no GPU (placement.accelerator: none): there is nothing to price")
    if gpu not in GPUS:
        raise Wrong(f"--gpu {gpu} must be one of {', '.join(GPUS)}")
    if (count := rows or run.spec.prompts.limit) is None:
        raise Wrong("how many rows? Set prompts.limit in the manifest, or add an option such as --rows 100000")
    found = None
    if read_models:
        from cgd_cli import models

        found = models.read(run, GPUS[gpu].memory)
    student = size("student", run.spec.student.model, student_params, found.student if found else None)
    served, none = run.spec.teacher.model, Size(0.0, 0.0)
    teacher = size("teacher", served, teacher_params, found.teacher if found else None) if served else none
    assumptions = Assumptions(
        rows=count,
        student=student.parameters,
        teacher=teacher.parameters,
        student_active=student.active,
        teacher_active=teacher.active,
        gpu=GPUS[gpu],
        gpu_hour=gpu_hour,
        currency=currency,
        prompt=prompt,
        answer=answer,
        critique=critique,
        refinement=refinement,
        thought=thought,
        teacher_thinks=found.teacher_thinks if found else None,
        input_million=input_million,
        output_million=output_million,
    )
    misfits = found.misfits if found else None
    if as_json:
        write(price_json(run, assumptions, misfits) + "\n")
    else:
        console.print(price_table(run, assumptions, gpu, misfits))
