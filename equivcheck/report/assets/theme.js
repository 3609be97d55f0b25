try{var t=localStorage.getItem("equivcheck-theme");if(t)document.documentElement.dataset.theme=t}catch(e){}document.documentElement.classList.add("js");
