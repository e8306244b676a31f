"""What rewards of drawings share: whether there is a picture that can be judged."""

from __future__ import annotations

from lvrpo.types import Trajectory


def problem_of(trajectory: Trajectory, judge: object = None) -> str | None:
    """Why the last picture of a trajectory cannot be judged; None where it can.

    ``judge``: who will read it; a policy may read pictures of one size only.
    """
    image = trajectory.image
    if image is None:
        return "nothing was drawn"
    side = getattr(judge, "image_size", None)  # a judge that is no policy reads any size
    if side is not None and tuple(image.shape[1:]) != (side, side):
        return f"a picture of {image.shape[2]} x {image.shape[1]}: the judge reads {side} x {side}"
    return None if image.isfinite().all() else "the picture holds values that are no numbers"
