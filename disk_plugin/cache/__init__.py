"""Run the teacher only once: augmentation as a function of (sample, view), and a cache of the teacher's outputs."""

from .teacher_cache import TeacherCache
from .views import SeededViews

__all__ = ["SeededViews", "TeacherCache"]
