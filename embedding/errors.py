"""Every error a user can cause or meet, as one tree.

    LookalikeError
    ├── InvalidInput            what was sent cannot be used; send something else
    │   ├── InvalidImage        not an image, truncated, of a format that is not accepted
    │   ├── ImageTooLarge       more pixels than the cap
    │   ├── InvalidVector       wrong width, NaN or infinite, not of unit length
    │   ├── InvalidOperatingPoint   a threshold or rate that the calibration cannot support
    │   ├── InvalidFilter       a condition on items that does not parse; `position` says where
    │   ├── RequestIdReused     a request_id that was given with another request
    │   ├── RequestTooLarge     a message over the server's limit; send smaller images, or fewer
    │   ├── ResponseTooLarge    an answer that no message carries; ask for less
    │   ├── InvalidRecipe       an unknown key, or a value out of its range
    │   └── InvalidDataset      a folder, manifest or split that cannot be trained on
    ├── NotFound                no such gallery, item, model or file
    ├── AlreadyExists           the name is taken
    ├── ModelMismatch           embeddings of another model
    ├── GalleriesIncompatible   galleries would be left without the model of their embeddings
    ├── ModelActive             the model that answers is not unloaded
    ├── ModelAmbiguous          two bundles say that they are the same and are not
    ├── StaleEtag               the item has changed since it was read
    ├── GalleryNotEmpty         a gallery that still holds items is deleted only by force
    ├── GalleryAliased          a gallery that an alias stands for is not deleted
    ├── ImagesNeeded            items whose image is needed and not stored; import them
    ├── JobChanged              a batch job was begun under other conditions than those of now
    ├── NotSupported            what this engine of galleries cannot do
    ├── Busy                    another process holds the folder, or Milvus is away
    ├── NotReady                the model is still loading
    ├── Overloaded              the server has as much to do as it takes on; `retry_seconds` says when to come again
    ├── Cancelled               the caller no longer wants the answer
    ├── DeadlineExceeded        the time limit passed before the answer was found
    ├── Unauthenticated         who calls is not known
    │   ├── CredentialsMissing  no key, token or certificate
    │   └── CredentialsInvalid  unknown, expired or revoked
    ├── PermissionDenied        who calls is known, and may not do this
    │   ├── ScopeMissing        the key has another scope than is needed
    │   └── GalleryForbidden    the key is not for this gallery
    ├── RateLimited             more calls than the key may make; `retry_seconds` says when to come again
    ├── TrainingDiverged        the loss is no longer a number
    ├── DamagedData             a checksum, manifest or weights file does not agree
    └── StorageFailed           the disk refused a read or a write

`reason` is stable and machine-readable; the message is one line for a person and says what to do next.
`field` is the path of the offending request field or recipe key, where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar


class LookalikeError(Exception):
    """Base of the tree; `str(error)` is fit to show to a user."""

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class InvalidInput(LookalikeError):
    reason = "INVALID_INPUT"
    also: tuple[InvalidInput, ...] = ()
    """What else is wrong with the same request."""


class InvalidImage(InvalidInput):
    reason = "INVALID_IMAGE"


class ImageTooLarge(InvalidInput):
    reason = "IMAGE_TOO_LARGE"


class InvalidVector(InvalidInput):
    reason = "INVALID_VECTOR"


class InvalidOperatingPoint(InvalidInput):
    reason = "INVALID_OPERATING_POINT"


class InvalidFilter(InvalidInput):
    reason = "INVALID_FILTER"

    def __init__(self, message: str, *, field: str | None = None, position: int | None = None) -> None:
        super().__init__(message, field=field)
        self.position = position
        """Of the first character that is wrong, from 1."""


class RequestIdReused(InvalidInput):
    reason = "REQUEST_ID_REUSED"


class RequestTooLarge(InvalidInput):
    reason = "REQUEST_TOO_LARGE"


class ResponseTooLarge(InvalidInput):
    reason = "RESPONSE_TOO_LARGE"


class InvalidRecipe(InvalidInput):
    reason = "INVALID_RECIPE"


class InvalidDataset(InvalidInput):
    reason = "INVALID_DATASET"


class NotFound(LookalikeError):
    reason = "NOT_FOUND"


class AlreadyExists(LookalikeError):
    reason = "ALREADY_EXISTS"


class ModelMismatch(LookalikeError):
    reason = "MODEL_MISMATCH"


class GalleriesIncompatible(LookalikeError):
    reason = "GALLERIES_INCOMPATIBLE"

    def __init__(
        self, message: str, *, field: str | None = None, galleries: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(message, field=field)
        self.galleries = galleries
        """Ids of the galleries, each with the model of its embeddings."""


class ModelActive(LookalikeError):
    reason = "MODEL_ACTIVE"


class ModelAmbiguous(LookalikeError):
    reason = "MODEL_AMBIGUOUS"


class StaleEtag(LookalikeError):
    reason = "STALE_ETAG"


class GalleryNotEmpty(LookalikeError):
    reason = "GALLERY_NOT_EMPTY"


class GalleryAliased(LookalikeError):
    reason = "GALLERY_ALIASED"


class ImagesNeeded(LookalikeError):
    reason = "IMAGES_NEEDED"


class JobChanged(LookalikeError):
    reason = "JOB_CHANGED"


class NotSupported(LookalikeError):
    reason = "NOT_SUPPORTED"


class Busy(LookalikeError):
    reason = "BUSY"


class NotReady(LookalikeError):
    reason = "NOT_READY"


class Overloaded(LookalikeError):
    reason = "OVERLOADED"

    def __init__(
        self, message: str, *, field: str | None = None, subject: str = "calls", retry_seconds: float = 1.0
    ) -> None:
        super().__init__(message, field=field)
        self.subject = subject
        """What there is too much of."""
        self.retry_seconds = retry_seconds
        """When it is worth trying again, from now."""


class Cancelled(LookalikeError):
    reason = "CANCELLED"


class DeadlineExceeded(LookalikeError):
    reason = "DEADLINE_EXCEEDED"


class Unauthenticated(LookalikeError):
    reason = "UNAUTHENTICATED"


class CredentialsMissing(Unauthenticated):
    reason = "CREDENTIALS_MISSING"


class CredentialsInvalid(Unauthenticated):
    reason = "CREDENTIALS_INVALID"


class PermissionDenied(LookalikeError):
    reason = "PERMISSION_DENIED"

    def __init__(self, message: str, *, field: str | None = None, needed: Mapping[str, str] | None = None) -> None:
        super().__init__(message, field=field)
        self.needed = dict(needed or {})
        """What the caller lacks: `scope`, and `gallery` where it is about one."""


class ScopeMissing(PermissionDenied):
    reason = "SCOPE_MISSING"


class GalleryForbidden(PermissionDenied):
    reason = "GALLERY_FORBIDDEN"


class RateLimited(LookalikeError):
    reason = "RATE_LIMITED"

    def __init__(
        self, message: str, *, field: str | None = None, subject: str = "", retry_seconds: float = 1.0
    ) -> None:
        super().__init__(message, field=field)
        self.subject = subject
        """Whose rate it is."""
        self.retry_seconds = retry_seconds
        """Seconds until a call would be admitted."""


class TrainingDiverged(LookalikeError):
    reason = "TRAINING_DIVERGED"


class DamagedData(LookalikeError):
    reason = "DAMAGED_DATA"


class StorageFailed(LookalikeError):
    reason = "STORAGE_FAILED"
