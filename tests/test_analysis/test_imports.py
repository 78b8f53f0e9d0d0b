import subprocess
import sys

CODE = """
import pkgutil, sys
sys.modules['matplotlib'] = None  # importing it fails
import mmtoken.analysis
for module in pkgutil.iter_modules(mmtoken.analysis.__path__, 'mmtoken.analysis.'):
    __import__(module.name)
"""


def test_analysis_needs_no_matplotlib():
    subprocess.run([sys.executable, '-c', CODE], check=True)
