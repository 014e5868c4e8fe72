from tests.interpreted import quick

quick.install()
