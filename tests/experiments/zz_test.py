def test_x(finished_run): 
  import subprocess
  print(subprocess.run(["find",str(finished_run),"-maxdepth","2"],capture_output=True,text=True).stdout)
