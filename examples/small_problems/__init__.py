"""Problems small enough to train hundreds of students on a CPU: data, teachers, training, candidates."""
