"""A signature of an artifact by OpenSSF model-signing: it tells who released the files.

The manifest tells what was released, and whoever changes a file can write another manifest; without
the private key nobody can write another signature. It lies in the folder as `model.sig` and covers
every other file, so that the tool of that project checks it, too. Nothing here needs a network.
https://github.com/sigstore/model-transparency
"""

from pathlib import Path
from types import ModuleType

from exporters import MissingDependency
from pipeline import manifest
from pipeline.manifest import SIGNATURE, Damaged
from pipeline.reading import RecipeError


def sign(folder: Path, key: Path, password: str | None = None) -> Path:
    """Sign an artifact that is whole, and return the file of the signature.

    Args:
        folder: the artifact; a signature that it has is replaced.
        key: an ECDSA private key (P-256, P-384 or P-521) in a PEM file.
        password: of the key, if it has one.

    Raises:
        Damaged: the folder is not what its manifest says.
        RecipeError: the key cannot be read, or used.
        MissingDependency: model-signing is not installed.
    """
    library, folder = _library(), folder.resolve()
    manifest.read(folder)
    _refuse_missing(key)
    unfinished = folder.with_name(f".{folder.name}.{SIGNATURE}")
    try:
        signer = library.signing.Config().use_elliptic_key_signer(
            private_key=key, password=password.encode() if password else None
        )
        signer.set_hashing_config(_hashing(library)).sign(folder, unfinished)
        manifest.sync(unfinished)
        unfinished.replace(folder / SIGNATURE)
    except (ValueError, TypeError) as error:  # what cryptography says of keys and passwords
        raise RecipeError(
            f"{key}: cannot be used: {_said(error)}; expected an ECDSA private key in PEM, and its"
            " password in SECATEUR_KEY_PASSWORD if it has one"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return folder / SIGNATURE


def check(folder: Path, key: Path) -> None:
    """Check that an artifact was signed with the private key of the public one in a PEM file.

    Raises:
        Damaged: it has no signature, or one of another key or of other files.
        MissingDependency: model-signing is not installed.
        RecipeError: the key cannot be read.
    """
    library = _library()
    if not (folder / SIGNATURE).is_file():
        raise Damaged(f"{folder / SIGNATURE}: found none, expected a signature; it was not signed")
    _refuse_missing(key)
    verifier = library.verifying.Config().use_elliptic_key_verifier
    try:
        checking = verifier(public_key=key).set_hashing_config(_hashing(library))
        checking.verify(folder, folder / SIGNATURE)
    except Exception as error:
        # Whatever it was that failed, nothing says that the files are those that were signed.
        raise Damaged(
            f"{folder / SIGNATURE}: does not verify with {key}: {_said(error)}"
        ) from error


def _hashing(library: ModuleType) -> object:
    """Return that every file counts but the signature, and that there are no links."""
    config = library.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    return config.set_allow_symlinks(allow_symlinks=False)


def _refuse_missing(key: Path) -> None:
    try:
        key.read_bytes()
    except OSError as error:
        raise RecipeError(f"{key}: cannot be read: {error.strerror}, expected a key") from None


def _library() -> ModuleType:
    try:
        import model_signing
    except ImportError as error:
        raise MissingDependency(
            f"{error.name}: not installed, expected it to sign and to check signatures; install the"
            " extra `sign`: pip install -e '.[sign]'"
        ) from error
    return model_signing


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
