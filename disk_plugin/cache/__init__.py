"""Run the teacher once: augmentation as a pure function of (sample, view), and a cache of the teacher's outputs."""

from .teacher_cache import TeacherCache
from .views import SeededViews

__all__ = ["SeededViews", "TeacherCache"]
