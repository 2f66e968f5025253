"""1,000 rows that belong to none of the 28 tasks: BIG-bench questions, in the frame and as plain text. python texts.py bigbench-1.0.0.tar.gz general.jsonl"""
import json, random, re, sys, tarfile

from meteora_core.data.tasks import TASKS

rows = []
with tarfile.open(sys.argv[1]) as tar:
    for member in tar:
        found = re.match(r'[^/]+/bigbench/benchmark_tasks/([^/]+)/task\.json$', member.name)
        if not found or found[1] in TASKS or member.size > 4_000_000: continue
        try: task = json.load(tar.extractfile(member))
        except ValueError: continue
        examples = [e for e in task.get('examples', []) if isinstance(e.get('input'), str) and 30 < len(e['input']) < 900]
        for e in random.Random(5).sample(examples, min(12, len(examples))):
            target = e.get('target') or (max(e['target_scores'], key=e['target_scores'].get) if e.get('target_scores') else None)
            target = target[0] if isinstance(target, list) and target else target
            if isinstance(target, str) and target: rows.append((found[1], e['input'], target))
random.Random(6).shuffle(rows)
tasks = sorted({r[0] for r in rows})
with open(sys.argv[2], 'w') as out:
    for number, (task, question, answer) in enumerate(rows[:1000]):
        row = {'kind': 'question', 'question': question, 'answer': answer} if number % 2 else {'kind': 'text', 'text': f'{question}\n{answer}'}
        out.write(json.dumps({**row, 'task': task}) + '\n')
print(len(rows), len(tasks), 'tasks')
