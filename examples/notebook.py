"""The whole chain from Python, as in a notebook; each block between ``# %%`` marks is a cell.

    python examples/notebook.py [FOLDER]

It takes two minutes on a laptop, with generated data and a tiny random language model. For real results, replace
``dataset=toy`` by your own tables and ``llm=tiny_random`` by a real model.
"""

# %% Folder of data and results
import sys
import tempfile
from pathlib import Path

import llm2rec

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
settings = ["dataset=toy", "dataset.n_users=120", "dataset.n_items=90", "llm=tiny_random", "logging.progress=false"]

# %% Prepare the data. `llm2rec.prepare(llm2rec.CsvTables(...), folder)` does the same without a configuration
llm2rec.run("data", *settings, folder=folder)
(prepared,) = (folder / "data" / "processed").glob("toy-*")
data = llm2rec.load_data(prepared)
print(f"{data.name}: {data.n_items} items, {len(data.splits['train'])} training rows")
print("one user's items:", [data.items[i]["title"] for i in data.sequences[0]["items"][:3]], "...")

# %% Train the baseline, the teacher, and the distilled student
baseline = llm2rec.run("student", *settings, "student.training.epochs=5", folder=folder, quiet=True)
teacher_run = llm2rec.run("teacher", *settings, "teacher.training.epochs=1", folder=folder, quiet=True)
distilled = llm2rec.run("distill", *settings, "student.training.epochs=5", folder=folder, quiet=True)

# %% Recommendations of the teacher, with log-probabilities
history = [data.items[i]["title"] for i in data.sequences[0]["items"][:4]]
teacher = llm2rec.TeacherRecommender.load(teacher_run, data)
for item in teacher.recommend_one(history, k=3, by="title"):
    print(f"teacher  {item.score:7.3f}  {item.title}")

# %% Recommendations of the student, in a fraction of a millisecond
student = llm2rec.Recommender.load(distilled)
for item in student.recommend_one(history, k=3, by="title"):
    print(f"student  {item.score:7.3f}  {item.title}")

# %% The student is a torch module
model = llm2rec.load_student(distilled / "student")
print(f"{type(model).__name__}, {sum(weight.numel() for weight in model.parameters()):,} parameters")

# %% All runs in one table, on the test split
comparison = llm2rec.run("evaluate", *settings, f"runs=[{baseline},{distilled}]", folder=folder, quiet=True)
print((comparison / "comparison.txt").read_text())
