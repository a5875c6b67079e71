"""Upload a checked folder to the Hub: exactly the files that the check listed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..files import holds_something, model_folder
from .card_text import id_in, read_card, split
from .check import CheckReport, check_folder, copy_files
from .contents import INDEX, WHOLE, one_line
from .usage import loading


logger = logging.get_logger(__name__)

# Files of an earlier model that must not stay in the repository. Weights in one file would be loaded instead of parts.
OF_EARLIER_MODEL = [WHOLE, INDEX, "model-?????-of-?????.safetensors", "record.json"]


class PublishError(RuntimeError):
    """The Hub refused, or could not be reached. The message says what to do."""


@dataclass(frozen=True)
class PublishResult:
    """What `publish` did.

    Attributes:
        repo_id: The id of the repository on the Hub.
        files: The files that were uploaded, with their sizes in bytes.
        url: The address of the commit; for a dry run, the folder.
        revision: The commit to pin; None for a dry run.
        pull_request: The address of the pull request, if one was opened.
        report: What `check_folder` found.
    """

    repo_id: str
    files: dict[str, int]
    url: str
    revision: str | None
    pull_request: str | None
    report: CheckReport

    @property
    def snippet(self) -> str:
        """Two lines that load exactly what was published."""
        task = self.report.task
        return loading("AutoModel" if task is None else task.auto_class, self.repo_id, self.revision)


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    dry_run: str | Path | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    load: bool = True,
    skip_others: bool = False,
    trust_remote_code: bool = False,
    report: CheckReport | None = None,
) -> PublishResult:
    """Check a folder with `check_folder` and upload the files that belong to it.

    Weights and the record of an earlier model are deleted in the repository, and its other files stay. An upload that
    was cut off continues where it stopped when `publish` is called again.

    Args:
        folder: The folder of a saved model.
        repo_id: The id on the Hub, "namespace/name". The repository is made if it is not there.
        private: Make a new repository private. A repository that exists stays as it is.
        create_pr: Open a pull request on a repository that exists, instead of writing to it.
        dry_run: A folder, empty or not there yet, that gets exactly the files that would be uploaded. Nothing is sent.
        revision: The branch to write to, which is made if it is not there. By default main.
        commit_message: The message of the commit.
        token: The token of the Hub. By default the one that `hf auth login` saved.
        endpoint: The address of the Hub. By default that in HF_ENDPOINT.
        load: Passed to `check_folder`.
        skip_others: Passed to `check_folder`.
        trust_remote_code: Passed to `check_folder`.
        report: A report that `check_folder` made just now. The folder is then not checked again.

    Returns:
        What was uploaded, and the revision to pin.

    Raises:
        ValueError: If the folder cannot be published.
        PublishError: If the Hub refuses, or cannot be reached.

    Example:
        >>> publish("deit-tome", "your-name/deit-tome", dry_run="upload")
    """
    if create_pr and revision is not None:
        raise ValueError(f"A pull request goes to main: with create_pr leave revision={revision!r} out.")
    target = check_destination(repo_id, dry_run)
    folder = Path(folder)
    if report is None:
        report = check_folder(folder, load=load, skip_others=skip_others, trust_remote_code=trust_remote_code)
    elif report.folder.resolve() != folder.resolve():
        raise ValueError(f"report is about {report.folder}, not about {folder}. Leave it out: then it is made anew.")
    report.raise_for_errors()
    named = id_in(split(read_card(folder / "README.md"))[1]) if "README.md" in report.files else None
    if named not in (None, repo_id):
        logger.warning(
            f"The code in README.md names {named}. To name {repo_id} there, write the card again with it: "
            f"tokenreduce card {folder} --repo-id {repo_id}, and publish once more."
        )
    if target is not None:
        with model_folder(target) as place:
            copy_files(folder, report.files, place)
        return PublishResult(repo_id, report.files, str(target), None, None, report)

    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    api = HfApi(endpoint=endpoint, token=token)
    with _clear_errors(repo_id, endpoint):
        if not create_pr:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision not in (None, constants.DEFAULT_REVISION):
                api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=sorted(report.files),
            delete_patterns=OF_EARLIER_MODEL,
            commit_message=commit_message or "A model with token reduction",
            revision=revision,
            create_pr=create_pr,
        )
    return PublishResult(repo_id, report.files, commit.commit_url, commit.oid, commit.pr_url, report)


def check_destination(repo_id: str, dry_run: str | Path | None = None) -> Path | None:
    """Raise a `ValueError` unless `repo_id` is the id of a repository, and `dry_run` a folder for the files.

    Args:
        repo_id: The id on the Hub, "namespace/name".
        dry_run: The folder of `publish`, empty or not there yet.

    Returns:
        The folder as a path. None: there is no dry run.

    Example:
        >>> check_destination("your-name/deit-tome", "upload")
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id must be 'namespace/name', got {repo_id!r}: {one_line(error)}") from None
    if "/" not in repo_id:
        raise ValueError(f"repo_id must be 'namespace/name', got {repo_id!r}. The namespace is your name on the Hub.")
    return None if dry_run is None else _empty_folder(Path(dry_run))


def _empty_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or holds_something(folder)):
        raise ValueError(f"dry_run={str(folder)!r} is there already and not an empty folder. Name another one.")
    return folder


@contextmanager
def _clear_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn every error on the way to the Hub into one line."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise PublishError("Nothing was sent: HF_HUB_OFFLINE is set. Unset it to publish.") from None
    except HfHubHTTPError as error:
        raise PublishError(_explain(error, repo_id, endpoint)) from error
    except (HTTPError, ConnectionError) as error:
        raise PublishError(
            f"{endpoint} cannot be reached: {one_line(error)}. Check the network, try again."
        ) from error
    except ValueError as error:
        raise ValueError(f"{endpoint} does not take the folder for {repo_id}: {one_line(error)}") from error
    except RuntimeError as error:
        # Transfers of single files wrap what went wrong.
        raise PublishError(f"The upload to {repo_id} broke off: {one_line(error.__cause__ or error)}") from error


def _explain(error: HfHubHTTPError, repo_id: str, endpoint: str) -> str:
    status = error.response.status_code
    if status == 401:
        return (
            f"{endpoint} does not know you (401). Log in with `hf auth login`, or pass token= with a token that may "
            f"write to {repo_id}. It answers the same for a repository that is not there."
        )
    if status == 403:
        return f"Your token may not write to {repo_id} (403). Use one with write access, or another namespace."
    if status == 404:
        return f"There is no repository {repo_id}, or you may not see it (404). A pull request needs one that exists."
    return f"{endpoint} refused the upload to {repo_id} ({status}): {one_line(error.server_message or error)}"
